import json
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import mapet
from mapet import MapetError
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.jobs.demo.run import FINETUNING
from mapet.jobs.export.run import export_model
from mapet.jobs.finetune.run import finetune
from mapet.jobs.pretrain.run import pretrain
from mapet.models.export import export_network

OUTPUTS = {"timm": "model", "onnx": "model.onnx", "torch": "model.pt2"}
CLASSES = ("crack", "dent", "whole | sound")


@pytest.fixture
def run(pretrained_run: Path) -> Path:
    return pretrained_run


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with keys that pre-training does not have, and a classifier with names."""
    out = tmp_path_factory.mktemp("runs") / "parts"
    (out / "exported").mkdir(parents=True)
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2, img_size=28, patch_size=7, in_chans=1, num_classes=3
    )
    torch.nn.init.normal_(network.head.weight)  # timm's zeros would give the same logits for every image
    export_network(network, out / "exported", (0.2,), (0.4,), crop_pct=0.9, classes=CLASSES)
    config = {
        "model": "/home/somebody/runs/photos/exported",
        "data": "/home/somebody/parts",
        "epochs": 3,
        "none": None,
        "layer_decay": 0.65,
        "teacher_weights": "https://me:secret@host/w.pth?token=secret",
    }
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    record = {"step": 5, "epoch": None, "loss": 0.5, "lr": 1e-3, "eval_accuracy": 0.875, "lacking": None}
    (out / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (out / "results.json").write_text(json.dumps({"test": {"accuracy": 0.9}, "from": "/home/somebody/parts/test"}))
    return out


def digits_100() -> Tensor:
    images = open_images("mnist")
    chosen = images.subset(range(0, len(images), len(images) // 100)[:100])
    return torch.stack([chosen.load(index, Reading(1)) for index in range(100)]) / 255


def load_network(folder: Path, size: tuple[int, int]) -> Any:
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    network.set_input_size(img_size=size)
    return network


def run_snippet(folder: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the usage snippet of a card on an image, and return what it prints."""
    monkeypatch.chdir(folder)
    Image.open(image).convert("RGB").resize((50, 40)).save("image.jpg")
    capsys.readouterr()
    exec(ModelCard.load(folder / "README.md").text.split("```python\n")[1].split("```")[0], {})
    return capsys.readouterr().out.strip()


def everything_in(path: Path) -> bytes:
    """The bytes of a file or folder, archives unpacked."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    found = [file.read_bytes() for file in files]
    for file in filter(zipfile.is_zipfile, files):
        with zipfile.ZipFile(file) as archive:
            found += [archive.read(name) for name in archive.namelist()]
    return b"".join(found)


@pytest.mark.parametrize(
    ("form", "size"),
    [("timm", (28, 28)), ("onnx", (28, 28)), ("torch", (28, 28)), ("timm", (28, 42)), ("torch", (28, 42))],
)
def test_every_format_gives_the_output_of_timm(
    form: str, size: tuple[int, int], run: Path, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / OUTPUTS[form]
    result = export_model(form, {"model": str(run), "image_size": size, "check": "mnist"}, out)
    assert (result["images"], result["checked_on"], result["input_size"]) == (100, "mnist", [1, *size])
    assert result["largest_difference"] <= (1e-5 if form == "onnx" else 0)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert result["bytes"] == sum(path.stat().st_size for path in [out, *out.glob("*")] if path.is_file())

    network = load_network(run / "exported", size)
    if form == "timm":
        exported = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        assert timm.data.resolve_model_data_config(exported)["input_size"] == (1, *size)
    elif form == "torch":
        described = {"mapet.json": ""}
        exported = torch.export.load(out, extra_files=described).module()
        assert json.loads(described["mapet.json"])["input_size"] == [1, *size]
    else:
        session = onnxruntime.InferenceSession(out)
        assert [value.name for value in session.get_outputs()] == ["features"]
        exported = lambda images: torch.tensor(session.run(["features"], {"images": images.numpy()})[0])  # noqa: E731
    images = torch.nn.functional.interpolate(digits_100(), size)
    for batch in (1, 2, 7, 90):
        with torch.no_grad():
            found, expected = exported(images[:batch]), network(images[:batch])
        torch.testing.assert_close(found, expected, atol=1e-5 if form == "onnx" else 0, rtol=0)

    content = everything_in(out)
    for place in (str(run), str(digits), str(Path.home()), str(Path(timm.__file__).parent), str(tmp_path)):
        assert place.encode() not in content, "an export must not name folders of this machine"


def test_onnx_of_a_classifier_at_another_size(classifier: Path, photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts.onnx"
    values = {"model": str(classifier), "image_size": "28x42", "crop_pct": 0.8, "check": str(photographs)}
    result = export_model("onnx", values, out)
    assert (result["images"], result["classes"], result["input_size"]) == (20, 3, [1, 28, 42])

    network = load_network(classifier / "exported", (28, 42))
    images = torch.nn.functional.interpolate(digits_100(), (28, 42))
    session = onnxruntime.InferenceSession(out)
    with torch.no_grad():
        expected = network(images)
    assert expected.std(dim=0).min() > 0.01, "the images must matter"
    np.testing.assert_allclose(session.run(["logits"], {"images": images.numpy()})[0], expected, atol=1e-5)

    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 18}
    assert {entry.key: json.loads(entry.value) for entry in model.metadata_props} == {
        "input_size": [1, 28, 42],
        "mean": [0.2],
        "std": [0.4],
        "crop_pct": 0.8,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "value_range": None,
        "classes": list(CLASSES),
    }


def test_the_card_of_a_run(
    run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "digits-vit"
    export_model("timm", {"model": str(run), "license": "cc-by-4.0"}, out)
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {
        "library_name": "timm",
        "license": "cc-by-4.0",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "image-feature-extraction", "mapet"],
    }
    assert json.loads((out / "config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-4.0"
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    entropy = json.loads((run / "baseline.json").read_text())["entropy"]
    for part in (
        "# digits-vit\n",
        "- network: vit_tiny_patch16_224 with ",
        f"- trained on: {digits.name}, 60 images, objective mapet, tokenizer pixels, 2 steps, 0.2857 epochs\n",
        f"- loss, mean of the last 100 logged steps: {sum(losses) / 2:.4g}\n",
        f"- loss without looking at the image: {entropy:.4g}\n",
        "arXiv:2306.07346",
    ):
        assert part in card.text
    assert "No licence" not in card.text
    settings = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    began_with = yaml.safe_load((run / "config.yaml").read_text())
    assert settings == {k: v for k, v in began_with.items() if v is not None} | {"data": digits.name}
    assert run_snippet(out, digits / "class 3" / "0.png", monkeypatch, capsys) == "torch.Size([1, 32])"


def test_the_card_of_a_run_of_another_kind(
    classifier: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "parts"
    result = export_model("timm", {"model": str(classifier)}, out)
    assert result["checked_on"] == "mnist", "its own images are gone"
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("unknown", "image-classification")
    for part in (
        "No licence has been chosen",
        "- output: logits of 3 classes: crack, dent, whole | sound\n",
        "- trained on: parts, 6 steps\n",
        "\nmodel: photos\n",
        "- eval_accuracy: 0.875\n",
        "layer_decay: 0.65",
        "teacher_weights: https://host/w.pth\n",
        "accuracy: 0.9",
    ):
        assert part in card.text
    for absent in ("somebody", "secret", "objective", "none: null", "lacking"):
        assert absent not in card.text
    assert run_snippet(out, digits / "class 3" / "0.png", monkeypatch, capsys) in CLASSES


def test_the_card_of_a_model_without_a_run(run: Path, tmp_path: Path) -> None:
    export_model("timm", {"model": str(run / "exported"), "check_images": 3}, tmp_path / "again")
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert f"- exported from: {run.name}\n" in card.text
    for absent in ("Configuration", "Citation", "loss"):
        assert absent not in card.text
    export_model("timm", {"model": str(run), "reinit": True, "check_images": 3}, tmp_path / "random")
    assert json.loads((tmp_path / "random" / "config.json").read_text())["pretrained_cfg"]["tag"] == "untrained"
    card = ModelCard.load(tmp_path / "random" / "README.md")
    assert "random parameters" in card.text
    assert "loss" not in card.text, "the run's figures are not those of random weights"


def test_float16_halves_the_file(run: Path, digits: Path, tmp_path: Path) -> None:
    whole = export_model("timm", {"model": str(run), "check_images": 7}, tmp_path / "whole")
    assert (whole["tolerance"], whole["images"], whole["checked_on"]) == (1e-4, 7, str(digits))
    half = export_model("timm", {"model": str(run), "dtype": "float16"}, tmp_path / "half")
    assert 0 < half["largest_difference"] <= half["tolerance"] == 0.02
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.55 * sizes[0]
    exact = mapet.load(run)[0].state_dict()
    for name, value in mapet.load(tmp_path / "half")[0].state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, exact[name].half().float())


def test_an_export_that_differs_is_not_kept(run: Path, tmp_path: Path) -> None:
    for name, change in {"large": 1e30, "larger": 3e38, "infinite": 1e39}.items():  # float16 cannot hold the first
        weights = load_file(shutil.copytree(run / "exported", tmp_path / name) / "model.safetensors")
        weights["patch_embed.proj.weight"] *= change
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    for form, name, values, says in (
        ("onnx", run, {"tolerance": 1e-12}, "differs from the model by up to .* more than the tolerance 1e-12"),
        ("timm", run, {"tolerance": 1e-12, "dtype": "float16"}, "more than the tolerance 1e-12"),
        ("timm", tmp_path / "large", {"dtype": "float16"}, "differs from the model by up to nan on 100 images"),
        ("timm", tmp_path / "larger", {}, "differs from the model by up to nan"),
        ("timm", tmp_path / "infinite", {}, "contain NaN or infinity"),
    ):
        with pytest.raises(MapetError, match=says):
            export_model(form, {"model": str(name), "check": "mnist", **values}, out / OUTPUTS[form])
        assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("form", "out", "values", "says"),
    [
        ("onnx", "model.pt2", {}, "is not a file name that ends in .onnx"),
        ("torch", "model", {}, "is not a file name that ends in .pt2"),
        ("timm", "", {}, "is not the name of a folder"),
        ("timm", "there", {}, "is there already"),
        ("onnx", "there/model.onnx", {}, "is there already"),
        ("timm", "x", {"check": "/no/images"}, "'/no/images' is neither a folder of images"),
        ("timm", "x", {"license": "Mine, all mine"}, "license = Mine, all mine"),
        ("onnx", "x.onnx", {"license": "mit"}, "unknown key 'license'"),
        ("timm", "x", {"check_images": 0}, "check_images = 0"),
        ("tim", "x", {}, "unknown format 'tim'; did you mean 'timm'"),
    ],
)
def test_wrong_input_is_refused(
    form: str, out: str, values: dict[str, Any], says: str, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model.onnx").write_text("mine")
    with pytest.raises(MapetError, match=says):
        export_model(form, {"model": str(run), **values}, tmp_path / out if out else "")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["there", "there/model.onnx"]
    assert (tmp_path / "there" / "model.onnx").read_text() == "mine"


@pytest.mark.parametrize(("form", "name"), [("timm", "vit"), ("torch", "vit.pt2")])
def test_a_full_disk_is_reported_in_one_sentence(form: str, name: str, run: Path, digits: Path, tmp_path: Path) -> None:
    """In a process of its own: torch's archive writer could end the process."""
    command = [sys.executable, "-m", "mapet", "export", form, str(run), "--check", str(digits), "--out"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    failed = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True, preexec_fn=limit)
    assert failed.returncode == 2
    assert re.search(rf"{tmp_path / name} cannot be written to .* large.*; free some space", failed.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(run: Path, tmp_path: Path) -> None:
    """In a process of its own, in which the package cannot be imported."""
    command = "import sys; sys.modules['onnxscript'] = None; from mapet.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["export", "onnx", str(run), "--out", str(tmp_path / "model.onnx")]
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs the package onnxscript: pip install 'mapet[onnx]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_card_names_the_runs_before_even_if_they_are_gone(run: Path, digits: Path, tmp_path: Path) -> None:
    def card(model: Path) -> str:
        export_model("timm", {"model": str(model), "check_images": 3}, tmp_path / f"card of {model.name}")
        return ModelCard.load(tmp_path / f"card of {model.name}" / "README.md").text

    source, first, second, fresh, more = (tmp_path / name for name in ("photos", "first", "second", "fresh", "more"))
    shutil.copytree(run, source)
    values = {**FINETUNING, "workers": 0, "steps": 1, "batch_size": 8, "data": str(digits)}
    finetune({**values, "model": str(source / "exported")}, first, console=Console(quiet=True))
    finetune({**values, "model": str(first)}, second, console=Console(quiet=True))
    finetune({**values, "model": str(source), "reinit": True}, fresh, console=Console(quiet=True))
    continued = {"init": str(source), "data": str(digits), "steps": 1, "batch_size": 8, "vocab_size": 16, "workers": 0}
    pretrain(continued, more, console=Console(quiet=True))
    shutil.rmtree(source)
    photos = (
        f"- before that, photos: {digits.name}, 60 images, objective mapet, tokenizer pixels, 2 steps, 0.2857 epochs"
    )
    last = card(second)
    assert f"- before that, first: {digits.name}, 50 images, 1 steps, 0.1667 epochs\n{photos}\n" in last
    heading = "## Configuration of the run before, photos\n\n```yaml\n"
    assert yaml.safe_load(last.split(heading)[1].split("```")[0])["objective"] == "mapet"
    assert str(tmp_path) not in last
    assert f"{photos}\n" in card(first)
    assert f"{photos}\n" in card(more)
    assert "before" not in card(fresh), "random weights come from no run"
