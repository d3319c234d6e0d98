import json
import subprocess
import sys
from pathlib import Path

import pytest

import mapet
from mapet.cli import main

SMALL = [
    *("--model", "vit_tiny_patch16_224", "--model-args", "embed_dim=32", "depth=2", "num_heads=2"),
    *("--image-size", "28", "--patch-size", "7", "--channels", "1", "--vocab-size", "16"),
    *("--batch-size", "8", "--workers", "0", "--steps", "2"),
]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail; return its one sentence."""
    assert main(arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mapet: error: ")]
    assert len(said) == 1
    return said[0]


def test_pretraining_needs_only_a_folder_of_images(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", str(digits), "--out", str(tmp_path / "run"), *SMALL]) == 0
    assert "local-dir:" in capsys.readouterr().err
    assert (tmp_path / "run" / "exported" / "model.safetensors").exists()
    assert main(["pretrain", "--out", str(tmp_path / "run"), "--resume"]) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--model", "vit_tiny_patch16_225"], "unknown model 'vit_tiny_patch16_225'; did you mean"),
        (["--model", "resnet18"], "model 'resnet18' is not a plain Vision Transformer"),
        (["--model-args", "depth"], "--model-args takes KEY=VALUE"),
        (["--model-args", "depth=0"], "take a depth of at least 1"),
        (["--image-size", "30"], "image size 30 is not divisible by the patch size 7"),
        (["--batch-size", "100"], "batch size 100 is larger than the data set of 60 images; pass --batch-size 60"),
        (["--tokenizer", "pixel"], "unknown tokenizer or teacher 'pixel'; did you mean 'pixels'"),
        (["--tokenizer", "/no/folder"], "tokenizer folder '/no/folder' does not exist"),
        (["--vocab-size", "100000"], "a codebook of 100000 ids needs at least as many patches"),
        (["--objective", "mapett"], "unknown objective 'mapett'; did you mean 'mapet'"),
        (["--objective", "mae"], "objective 'mae' predicts pixels, which need no token ids"),
        (["--targets", "features"], "targets is 'features', but there is no teacher; name one with --teacher"),
        (["--teacher", "resnet18"], "add --targets features, or name it as --tokenizer"),
        (["--mask-ratio", "0.01"], "mask_ratio 0.01 of 16 patches leaves no target; take 0.0625 to 0.938"),
        (["--eval-data", "/no/labels"], "'/no/labels' is neither a folder with one subfolder per class"),
        (["--config", "dem"], "recipe 'dem' is neither a file nor one of the package's recipes"),
    ],
)
def test_wrong_input_is_one_sentence_and_nothing_is_written(
    change: list[str], says: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert says in refused(capsys, "pretrain", str(digits), "--out", str(out), *SMALL, *change)
    assert not out.exists() or {path.name for path in out.iterdir()} == {".lock", "log.txt"}


def test_folders_that_cannot_be_used(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run"), *SMALL]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("no image")
    assert "holds no image" in refused(capsys, "pretrain", str(tmp_path / "empty"), *out)
    assert "lacks 'data'" in refused(capsys, "pretrain", *out)
    assert "not valid UTF-8; rename it" in refused(capsys, "pretrain", "dat\udcff", *out)
    assert not (tmp_path / "run").exists()
    assert "output folder is empty" in refused(capsys, "pretrain", str(digits), "--out", "", *SMALL)
    said = refused(capsys, "finetune", "m", str(digits), "--out", str(tmp_path))
    assert f"output folder {tmp_path} holds 'empty', but no run" in said
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        said = refused(capsys, "pretrain", str(digits), "--out", str(folder), *SMALL)
        assert f"output folder {folder} cannot be written to" in said


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("", "a command is missing; see mapet --help"),
        ("predikt", "unknown command 'predikt'; did you mean 'predict'"),
        ("eval", "a command is missing; see mapet eval --help"),
        ("eval lineer", "unknown command 'eval lineer'; did you mean 'linear'"),
        ("embed m d", "required: --out; see mapet embed --help"),
        ("export onnx m --out", "argument --out: expected one argument; see mapet export onnx --help"),
        ("demo --dataset emoji", "invalid choice: 'emoji'"),
        (
            "tokenizer fit d --out x --imge-size 3",
            "unrecognized arguments: --imge-size 3; see mapet tokenizer fit --help; did you mean '--image-size'?",
        ),
        ("pretrain d --out x --order raster", "flag --order is now --masking; see mapet pretrain --help"),
        ("pretrain d --out x --context-tokens=9", "flag --context-tokens is now --mask-ratio (share of the patches"),
        ("convert mae file --out x", "mapet convert mae is gone; pass timm's name 'vit_base_patch16_224.mae' as model"),
        ("bootstrap d --out x", "mapet bootstrap is gone; run mapet pretrain again with --tokenizer RUN/exported"),
        (f"pretrain --out x --config {'x' * 300}", "File name too long"),
    ],
)
def test_wrong_commands_are_one_sentence(command: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, *command.split())


@pytest.mark.parametrize("command", ["pretrain d", "eval knn m d", "export timm m", "tokenizer fit d", "demo"])
def test_output_names_that_no_file_can_have_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *command.split(), "--out", "b\udcff")
    assert r"'b\udcff' is not valid UTF-8; choose another name" in said
    said = refused(capsys, *command.split(), "--out", "a/" + "ä" * 125 + "/b")
    assert "... is 250 bytes long; choose one of at most 249 bytes" in said


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        ("--help", 0, "pre-train a ViT on unlabelled images"),
        ("eval --help", 0, "eval knn"),
        ("pretrain --help", 0, "--tokenizer"),
        ("compare --help", 0, "--objectives"),
        ("pretrain ./no-such-folder --out x", 2, "'./no-such-folder' is neither a folder of images, nor an image"),
    ],
)
def test_help_and_refusals_import_no_torch(command: str, status: int, says: str, tmp_path: Path) -> None:
    code = (
        "import sys; from mapet.cli import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as stop: status = stop.code\n"
        "print('torch' in sys.modules); sys.exit(status)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *command.split()], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert says in ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "False"
    assert ended.returncode == status


def test_python_m_mapet_prints_the_version() -> None:
    command = [sys.executable, "-m", "mapet", "--version"]
    assert subprocess.check_output(command, text=True) == f"mapet {mapet.__version__}\n"


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m mapet tokenizer --help | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) in ((0, ""), (141, ""))


def test_public_names_can_be_imported() -> None:
    assert all(getattr(mapet, name) is not None for name in mapet.__all__)
    with pytest.raises(AttributeError, match="no attribute 'mappet'"):
        _ = mapet.mappet


def test_finetune_prints_one_object(
    exported_vit: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--out", str(tmp_path / "run")]
    flags = ["--steps", "2", "--batch-size", "8", "--workers", "0", "--augment", "none", "--layer-decay", "none"]
    assert main(["finetune", str(exported_vit), str(digits), *run, "--json", *flags]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert 0 <= found["accuracy"] <= 1
    assert Path(found["exported"]) == tmp_path / "run" / "exported"
    assert "on the test images" in said.err
    assert "mapet predict" in said.err
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "augment: null\n" in config
    assert "layer_decay: null\n" in config
    assert main(["finetune", *run, "--resume"]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "lacks 'data': labelled images"),
        (["mnist", "--label-share", "0.1", "--labels-per-class", "3"], "give label_share or labels_per_class"),
        (["mnist", "--config", "finetune_base", "--labels-per-class", "3"], "batch size 512 is larger than the data"),
    ],
)
def test_finetune_refuses_wrong_values(
    arguments: list[str], says: str, exported_vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, "finetune", str(exported_vit), *arguments, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.yaml").exists()
