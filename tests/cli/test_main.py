from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mapet
from mapet.cli import main

SMALL = [
    "--model",
    "vit_tiny_patch16_224",
    "--model-args",
    "embed_dim=32",
    "depth=2",
    "num_heads=2",
    "--image-size",
    "28",
    "--patch-size",
    "7",
    "--channels",
    "1",
    "--vocab-size",
    "16",
    "--batch-size",
    "8",
    "--workers",
    "0",
    "--steps",
    "2",
]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail; return its one sentence."""
    assert main(arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mapet: error: ")]
    assert len(said) == 1
    return said[0]


def test_a_folder_of_images_is_all_it_takes(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", str(digits), "--out", str(tmp_path / "run"), *SMALL]) == 0
    assert "local-dir:" in capsys.readouterr().err
    assert (tmp_path / "run" / "exported" / "model.safetensors").exists()
    assert main(["pretrain", "--out", str(tmp_path / "run"), "--resume"]) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--model", "vit_tiny_patch16_225"], "unknown model 'vit_tiny_patch16_225'; did you mean"),
        (["--image-size", "30"], "image size 30 is not divisible by the patch size 7"),
        (["--batch-size", "100"], "batch size 100 is larger than the data set of 60 images; pass --batch-size 60"),
        (["--tokenizer", "pixel"], "unknown tokenizer or teacher 'pixel'; did you mean 'pixels'"),
        (["--tokenizer", "/no/folder"], "tokenizer folder '/no/folder' does not exist"),
        (["--objective", "mapett"], "unknown objective 'mapett'; did you mean 'mapet'"),
        (["--objective", "mae"], "'mae' predicts pixels and takes no token ids"),
        (
            ["--objective-args", "decoder_depth=1"],
            "objective 'mapet' has no argument 'decoder_depth'; it takes targets_per_image",
        ),
        (["--objective-args", "depth"], "--objective-args takes KEY=VALUE"),
        (["--context-tokens", "17"], "no target is left to predict"),
        (["--channels", "4"], "image files are read as 1 (grey) or 3 (RGB)"),
        (["--vocab-size", "100000"], "a codebook of 100000 ids needs at least as many patches"),
        (["--lr", "quick"], "lr = 'quick'"),
        (["--config", "dem"], "recipe 'dem' is neither a file nor one of the package's recipes"),
        (["--eval-data", "/no/labels"], "'/no/labels' is neither a folder with one subfolder per class"),
        (["--model-args", "depth"], "--model-args takes KEY=VALUE"),
        (["--epochs", "3"], "give epochs or steps, not both"),
        (["--model-args", "depth=0"], "take a depth of at least 1"),
        (["--model-args", "num_heads=0"], "cannot build model"),
        (["--model-args", "img_size=30"], "use --image-size"),
        (["--model", "resnet18"], "model 'resnet18' is not a plain Vision Transformer"),
        (["--tokenizer", "a:b"], "could not be fetched"),
        (["--workers", "100000"], "workers = 100000"),
        (["--eval-data", ""], "eval_data = ''"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    change: list[str], says: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert says in refused(capsys, "pretrain", str(digits), "--out", str(out), *SMALL, *change)
    assert not out.exists() or {path.name for path in out.iterdir()} == {".lock", "log.txt"}


def test_bad_folders(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run"), *SMALL]
    assert "neither a folder of images" in refused(capsys, "pretrain", str(tmp_path / "missing"), *out)
    (tmp_path / "empty" / "nested").mkdir(parents=True)
    assert "holds no image" in refused(capsys, "pretrain", str(tmp_path / "empty"), *out)
    (tmp_path / "empty" / "notes.md").write_text("no image")
    assert "holds no image" in refused(capsys, "pretrain", str(tmp_path / "empty"), *out)
    assert "lacks 'data'" in refused(capsys, "pretrain", *out)
    said = refused(capsys, "pretrain", "dat\udcff", *out)
    assert "not valid UTF-8; rename it, or link to it by another name" in said
    assert "output folder is empty" in refused(capsys, "pretrain", str(digits), "--out", "", *SMALL)
    (tmp_path / "recipe.yaml").write_text("epoch: 3\n")
    said = refused(capsys, "pretrain", str(digits), *out, "--config", str(tmp_path / "recipe.yaml"))
    assert "unknown key 'epoch'; did you mean 'epochs'" in said
    assert not (tmp_path / "run").exists()
    # Before the images are looked for.
    for command in (["pretrain", "/none"], ["finetune", "m", "/none"]):
        assert f"output folder {tmp_path} holds 'empty', but no run" in refused(
            capsys, *command, "--out", str(tmp_path)
        )


def test_output_folders_that_cannot_be(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", Path("/proc/run")):
        said = refused(capsys, "pretrain", str(digits), "--out", str(out), *SMALL)
        assert f"output folder {out} cannot be written to" in said


def test_what_the_system_refuses_is_a_sentence_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "File name too long" in refused(capsys, "pretrain", "--out", "x", "--config", "x" * 300)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: VERB; see mapet --help"),
        (["predikt"], "invalid choice: 'predikt' (choose from 'pretrain', "),
        (["embed", "m", "d"], "required: --out; see mapet embed --help"),
        (["export", "onnx", "m", "--out"], "argument --out: expected one argument; see mapet export onnx --help"),
        (["bootstrap", "d", "--out", "x", "--rounds", "few"], "invalid int value: 'few'; see mapet bootstrap --help"),
        (
            ["tokenizer", "fit", "d", "--out", "x", "--imge-size", "3"],
            "unrecognized arguments: --imge-size 3; see mapet tokenizer fit --help; did you mean '--image-size'?",
        ),
    ],
)
def test_what_cannot_be_parsed_is_one_sentence(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "d"],
        ["finetune", "m", "d"],
        ["eval", "knn", "m", "d"],
        ["eval", "segment", "m", "d"],
        ["predict", "m", "d"],
        ["embed", "m", "d"],
        ["export", "timm", "m"],
        ["convert", "upstream", "f"],
        ["tokenizer", "fit", "d"],
        ["tokenizer", "encode", "d"],
        ["bootstrap", "d"],
        ["demo"],
    ],
)
def test_names_that_cannot_be_written_are_refused_first(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert r"'b\udcff' is not valid UTF-8; choose another name" in refused(capsys, *command, "--out", "b\udcff")
    said = refused(capsys, *command, "--out", "a/" + "ä" * 125 + "/b")
    assert "... is 250 bytes long; choose one of at most 249 bytes" in said


def test_flags_override_recipes(digits: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 50\nlr: 1.0e-4\nmodel_args: {depth: 1, embed_dim: 32}\n")
    assert main(["pretrain", str(digits), "--out", str(tmp_path / "run"), "--config", str(recipe), *SMALL]) == 0
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "lr: 0.0001\n" in saved
    assert "steps: 2\n" in saved
    assert "epochs: null\n" in saved
    assert "depth: 2\n" in saved


def test_python_dash_m_and_help_are_quick_to_import() -> None:
    """Help and refusals of the command line itself must not wait for torch."""
    code = "import sys, mapet.cli; mapet.cli.main(['pretrain', '--help'])"
    shown = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert "--tokenizer" in shown.stdout
    assert all(line.split("|")[-1].strip() != "torch" for line in shown.stderr.splitlines())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"mapet {mapet.__version__}"


def test_everything_public_can_be_imported() -> None:
    assert all(getattr(mapet, name) is not None for name in mapet.__all__)
    with pytest.raises(AttributeError, match="no attribute 'mappet'"):
        _ = mapet.mappet


@pytest.mark.skipif(shutil.which("mapet") is None, reason="not installed as a command")
def test_the_installed_command() -> None:
    assert "pretrain" in subprocess.run(["mapet", "--help"], capture_output=True, text=True, check=True).stdout
