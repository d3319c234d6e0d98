from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from mapet.cli import main
from mapet.data.labelled import from_labelled_folder
from mapet.data.views import PlainView
from mapet.jobs.demo.run import FINETUNING
from mapet.jobs.evaluate.run import evaluate
from mapet.jobs.finetune.run import finetune
from mapet.models.export import export_network

KINDS = ("knn", "linear", "attentive")
QUICK = ["--workers", "0", "--steps", "20", "--seeds", "2"]
CLASSES = tuple(f"class {digit}" for digit in range(10))


def build(classes: int = 0) -> nn.Module:
    torch.manual_seed(9)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=7,
        in_chans=1,
        depth=1,
        embed_dim=32,
        num_heads=2,
        num_classes=classes,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an exported model."""
    exported = tmp_path_factory.mktemp("eval") / "run" / "exported"
    exported.mkdir(parents=True)
    export_network(build(), exported, (0.5,), (0.5,))
    return exported.parent


@pytest.fixture(scope="module")
def classifier(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has learned the digits, in another order, and knows one class more."""
    network, images, view = build(11), from_labelled_folder(digits), PlainView((28, 28), (0.5,), (0.5,), 0.9)
    batch = torch.stack([view(images.load(i, 1))[1] for i in range(60)])
    labels = 10 - torch.tensor(images.labels)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network(batch), labels).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("eval") / "classifier"
    folder.mkdir()
    export_network(network, folder, (0.5,), (0.5,), classes=("other", *reversed(CLASSES)))
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["eval", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["eval", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    said = [line for line in captured.err.splitlines() if line.startswith("mapet: error: ")]
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize("kind", KINDS)
def test_one_json_object_and_a_folder(
    kind: str, model: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = QUICK if kind != "knn" else ["--workers", "0", "--k", "1,5,1000"]
    found = printed(capsys, kind, str(model), str(digits), "--out", str(tmp_path / "out"), *quick)
    assert found["kind"] == kind
    assert 0 <= found["accuracy"] <= 1
    assert (found["train_images"], found["test_images"]) == (50, 10)
    assert list(found["per_class"]) == list(CLASSES)
    assert sum(map(sum, found["confusion"])) == 10 * (1 if kind == "knn" else 2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "results.md", "confusion.csv"}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    rows = list(csv.reader((tmp_path / "out" / "confusion.csv").open()))
    assert [list(map(int, row[1:])) for row in rows[1:]] == found["confusion"]
    assert f"| accuracy | {100 * found['accuracy']:.2f} % |" in (tmp_path / "out" / "results.md").read_text()
    if kind == "knn":
        assert [row["k"] for row in found["sweep"]] == [1, 5]
        assert found["accuracy"] == next(row["test"] for row in found["sweep"] if row["k"] == found["k"])
    else:
        accuracies = [run["accuracy"] for run in found["runs"]]
        assert [run["seed"] for run in found["runs"]] == [0, 1]
        assert (found["least"], found["greatest"]) == (min(accuracies), max(accuracies))
        assert found["accuracy"] == pytest.approx(sum(accuracies) / 2)
        assert len(found["sweep"]) == (15 if kind == "linear" else 3)


def test_run_folder_exported_folder_and_timm_name_go_the_same_way(
    model: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = ["--steps", "20", "--seeds", "1"]
    run, exported, again = (
        printed(capsys, "linear", str(source), str(digits), *linear, *more)
        for source, more in ((model, ()), (model / "exported", ()), (model, ("--batch-size", "7")))
    )
    assert run["confusion"] == exported["confusion"] == again["confusion"]
    small = ["--image-size", "32", "--reinit"]
    named = printed(capsys, "linear", "vit_tiny_patch16_224", str(digits), *linear, *small)
    assert named["image_size"] == [32, 32]
    assert printed(capsys, "knn", "resnet18", str(digits), *small)["kind"] == "knn"


def test_random_weights_are_other_weights(model: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, zero, one = (
        printed(capsys, "knn", str(model), "mnist", "--k", "10", *more)
        for more in ((), ("--reinit",), ("--reinit", "--seed", "1"))
    )
    assert not own["reinit"]
    assert zero["reinit"]
    assert own["sweep"] != zero["sweep"] != one["sweep"]


def test_a_table_for_people(model: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "knn", str(model), str(digits), "--workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert all(name in shown for name in CLASSES)


def test_features_by_name(model: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        kind: printed(capsys, "knn", str(model), str(digits), "--features", kind)["sweep"]
        for kind in ("pooled", "class", "mean", "class+mean")
    }
    assert found["pooled"] == found["class"] != found["mean"] != found["class+mean"]
    convnet = ["knn", "resnet18", str(digits), "--reinit", "--image-size", "32"]
    assert "need a class token, which resnet18 lacks" in refused(capsys, *convnet, "--features", "class")


def test_a_classifier_is_matched_by_name(
    classifier: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = printed(capsys, "classify", str(classifier), str(digits), "--out", str(tmp_path / "out"))
    assert (found["test_images"], found["crop_pct"]) == (60, 0.9)
    assert list(found["per_class"]) == ["other", *reversed(CLASSES)]
    assert found["per_class"]["other"] is None
    network = timm.create_model(f"local-dir:{classifier}", pretrained=True).eval()
    images, view = from_labelled_folder(digits), PlainView((28, 28), (0.5,), (0.5,), 0.9)
    with torch.no_grad():
        predicted = network(torch.stack([view(images.load(i, 1))[1] for i in range(60)])).argmax(1)
    right = predicted == 10 - torch.tensor(images.labels)
    assert found["accuracy"] > 0.5
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))
    for part, count in (("train", 6), ("val", 2)):
        for name in ("class 3", "class 7"):
            target = tmp_path / "parts" / part / name
            target.mkdir(parents=True)
            for file in sorted((digits / name).iterdir())[:count]:
                shutil.copy(file, target)
    parts = printed(capsys, "classify", str(classifier), str(tmp_path / "parts"), "--crop-pct", "none")
    assert (parts["test_images"], parts["crop_pct"]) == (4, 1.0)


def test_a_class_without_test_images(model: Path, digits: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(digits, tmp_path / "d" / "train")
    shutil.copytree(digits / "class 3", tmp_path / "d" / "test" / "class 3")
    found = printed(capsys, "knn", str(model), str(tmp_path / "d"))
    assert found["per_class"]["class 3"] == found["accuracy"]
    assert [name for name, value in found["per_class"].items() if value is None] == [
        name for name in CLASSES if name != "class 3"
    ]
    (tmp_path / "d" / "test" / "class 3").rename(tmp_path / "d" / "test" / "class X")
    assert "images of the class 'class X', which" in refused(capsys, "linear", str(model), str(tmp_path / "d"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["knn", "MODEL", "DIGITS", "--k", "500"], "k = 500 needs as many training images, but there are 40"),
        (["knn", "MODEL", "DIGITS", "--k", "0"], "k.0 = 0"),
        (["knn", "MODEL", "DIGITS", "--temperature", "0"], "temperature = 0"),
        (["knn", "MODEL", "DIGITS/class 3"], "lies outside of any; move it"),
        (["knn", "MODEL", "nowhere"], "'nowhere' is neither a folder with one subfolder per class"),
        (["knn", "vit_tinny_patch16_224", "DIGITS"], "unknown model 'vit_tinny_patch16_224'"),
        (["knn", "MODEL", "DIGITS", "--image-size", "30"], "30 is not divisible by its patch size 7"),
        (["knn", "MODEL", "DIGITS", "--features", "all"], "features = 'all'"),
        (["knn", "MODEL"], "lacks 'data'"),
        (["linear", "MODEL", "DIGITS", "--lr", "0.1,fast"], "lr.1 = 'fast'"),
        (["linear", "MODEL", "DIGITS", "--seeds", "0"], "seeds = 0"),
        (["classify", "MODEL", "DIGITS"], "has no classifier; fine-tune it first"),
        (["classify", "CLASSIFIER", "mnist"], "images of the classes '0', '1'"),
        (["attentive", "MODEL", "DIGITS", "--out", "DIGITS/out"], "lies inside the image folder"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], says: str, model: Path, classifier: Path, digits: Path, tmp_path: Path, capsys: Any
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    names = {"MODEL": str(model), "DIGITS": str(digits), "CLASSIFIER": str(classifier)}
    filled = [names.get(part, part.replace("DIGITS/", f"{digits}/")) for part in arguments]
    assert says in refused(capsys, *filled, *out)
    assert not list(tmp_path.iterdir())


def test_one_class_is_refused(model: Path, digits: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(digits / "class 3", tmp_path / "d" / "class 3")
    assert "has the single class 'class 3'" in refused(capsys, "knn", str(model), str(tmp_path / "d"))


def test_models_that_cannot_be_read(model: Path, digits: Path, tmp_path: Path, capsys: Any) -> None:
    cut = shutil.copytree(model / "exported", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    assert "it may be cut short" in refused(capsys, "knn", str(cut), str(digits))
    broken = shutil.copytree(model / "exported", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors")
    assert "contain NaN or infinity (first 'norm.weight'" in refused(capsys, "linear", str(broken), str(digits))


def test_an_output_that_is_there_is_left_alone(model: Path, digits: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    said = refused(capsys, "knn", str(model), str(digits), "--out", str(tmp_path / "out"))
    assert "is there already and is not empty" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_damaged_images_are_named_and_counted(model: Path, digits: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(digits, tmp_path / "d")
    (tmp_path / "d" / "class 4" / "2.png").write_bytes(b"cut")
    assert main(["eval", "knn", str(model), str(tmp_path / "d"), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["train_images"] + found["test_images"] == 59
    assert "skipped damaged image class 4/2.png" in captured.err
    assert "--max-damaged" in refused(capsys, "knn", str(model), str(tmp_path / "d"), "--max-damaged", "0.01")


def test_networks_without_patches(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (str(digits), "--reinit", "--workers", "0", "--image-size", "224", "--batch-size", "4")
    assert printed(capsys, "knn", "levit_128s", *command)["features"] == "pooled"
    for kind, more in (("attentive", ()), ("knn", ("--features", "mean"))):
        assert "need a grid of patches, which levit_128s lacks" in refused(capsys, kind, "levit_128s", *command, *more)
    assert "cannot take images of 28 x 28 pixels" in refused(
        capsys, "linear", "mixer_s32_224", *command, "--image-size", "28"
    )


def test_a_classifier_measured_on_what_it_learned_from_says_so(
    model: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {**FINETUNING, "workers": 0, "steps": 1, "batch_size": 8, "model": str(model)}
    whole, parted, few = (tmp_path / name for name in ("whole", "parted", "few"))
    for part, files in (("train", 5), ("test", 1)):
        for name in CLASSES:
            (tmp_path / "parts" / part / name).mkdir(parents=True)
            for file in sorted((digits / name).iterdir())[-files:]:
                shutil.copy(file, tmp_path / "parts" / part / name)
    for out, data, more in (
        (whole, digits, {"seed": 3}),
        (parted, tmp_path / "parts", {}),
        (few, digits, {"labels_per_class": 2}),
    ):
        finetune({**quick, **more, "data": str(data)}, out, console=Console(quiet=True))
    (tmp_path / "link").symlink_to(digits)
    for run, data, seen, measured in (
        (whole, digits, 50, 60),
        (whole, tmp_path / "link", 50, 60),
        (few, digits, 20, 60),
        (whole / "exported", digits, 50, 60),
        (parted, tmp_path / "parts" / "train", 50, 50),
        (parted, tmp_path / "parts", 0, 10),
        (parted, digits, 0, 60),
    ):
        assert main(["eval", "classify", str(run), str(data), "--json"]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out)["images_trained_on"] == seen
        warned = f"warning: {seen} of the {measured} images measured are among those that {run} was trained on"
        assert (warned in captured.err) == (seen > 0)
    shutil.rmtree(tmp_path / "parts")
    assert "images_trained_on" not in printed(capsys, "classify", str(parted), str(digits)), "nothing tells"
    assert "images_trained_on" not in printed(capsys, "classify", str(whole), str(digits), "--reinit")


def test_a_probe_says_which_repetition_it_is_at_and_why_it_trains_twice(model: Path, digits: Path) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=200)
    evaluate(
        "attentive", {"model": str(model), "data": str(digits), "workers": 0, "seeds": 2, "seed": 5}, console=terminal
    )
    for said in ("probe, seed 1 of 2", "probe, seed 2 of 2", "0/600", "600/600", "training the best again"):
        assert said in shown.getvalue()
