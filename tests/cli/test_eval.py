import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from rich.console import Console

from mapet.cli import main
from mapet.data.open import labelled, open_images
from mapet.data.reading import Reading
from mapet.data.views import PlainView
from mapet.jobs.demo.run import FINETUNING
from mapet.jobs.finetune.run import finetune
from mapet.models.export import export_network

QUICK = ["--workers", "0", "--steps", "20", "--seeds", "2"]
CLASSES = tuple(f"class {digit}" for digit in range(10))


@pytest.fixture(scope="module")
def classifier(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier trained on the digits, with one more class and the classes in reverse order."""
    images, view = labelled(open_images(str(digits))), PlainView((28, 28), (0.5,), (0.5,), 0.9)
    torch.manual_seed(9)
    small = {"img_size": 28, "patch_size": 7, "in_chans": 1, "depth": 1, "embed_dim": 32, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", **small, num_classes=11)
    batch = torch.stack([view(images.load(i, Reading(1)))[1] for i in range(60)])
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


def copy_digits(digits: Path, target: Path, classes: Sequence[str], files: slice) -> None:
    for name in classes:
        (target / name).mkdir(parents=True)
        for file in sorted((digits / name).iterdir())[files]:
            shutil.copy(file, target / name)


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


@pytest.mark.parametrize("kind", ["knn", "linear", "attentive"])
def test_json_and_files(
    kind: str, pretrained_run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = QUICK if kind != "knn" else ["--workers", "0", "--k", "1,5,1000"]
    found = printed(capsys, kind, str(pretrained_run), str(digits), "--out", str(tmp_path / "out"), *quick)
    assert (found["kind"], found["train_images"], found["test_images"]) == (kind, 50, 10)
    assert list(found["per_class"]) == list(CLASSES)
    assert sum(map(sum, found["confusion"])) == 10 * (1 if kind == "knn" else 2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "results.md", "confusion.csv"}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    if kind == "knn":
        assert [row["k"] for row in found["sweep"]] == [1, 5]
        assert found["accuracy"] == next(row["test"] for row in found["sweep"] if row["k"] == found["k"])
    else:
        accuracies = [run["accuracy"] for run in found["runs"]]
        assert [run["seed"] for run in found["runs"]] == [0, 1]
        assert (found["least"], found["greatest"]) == (min(accuracies), max(accuracies))
        assert found["accuracy"] == pytest.approx(sum(accuracies) / 2)
        assert len(found["sweep"]) == (15 if kind == "linear" else 3)


def test_run_folder_exported_folder_and_name_of_a_timm_model(
    pretrained_run: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = ["--steps", "20", "--seeds", "1"]
    run, exported, small_batch = (
        printed(capsys, "linear", str(source), str(digits), *linear, *more)
        for source, more in (
            (pretrained_run, ()),
            (pretrained_run / "exported", ()),
            (pretrained_run, ("--batch-size", "7")),
        )
    )
    assert run["confusion"] == exported["confusion"] == small_batch["confusion"]
    small = ["--image-size", "32", "--reinit"]
    named = printed(capsys, "linear", "vit_tiny_patch16_224", str(digits), *linear, *small)
    assert named["image_size"] == [32, 32]


def test_reinit_draws_random_weights_by_the_seed(pretrained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, zero, one = (
        printed(capsys, "knn", str(pretrained_run), "mnist", "--k", "10", *more)
        for more in ((), ("--reinit",), ("--reinit", "--seed", "1"))
    )
    assert (own["reinit"], zero["reinit"]) == (False, True)
    assert own["sweep"] != zero["sweep"] != one["sweep"]


def test_tables_on_the_terminal(pretrained_run: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "knn", str(pretrained_run), str(digits), "--workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("accuracy", str(pretrained_run.name), *CLASSES))


def test_kinds_of_features(classifier: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        kind: printed(capsys, "knn", str(classifier), str(digits), "--features", kind)["sweep"]
        for kind in ("pooled", "class", "mean", "class+mean")
    }
    assert found["pooled"] == found["class"] != found["mean"] != found["class+mean"]


def test_a_classifier_is_measured_by_the_names_of_its_classes(
    classifier: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = printed(capsys, "classify", str(classifier), str(digits))
    assert (found["test_images"], found["crop_pct"]) == (60, 0.9)
    assert list(found["per_class"]) == ["other", *reversed(CLASSES)]
    assert found["per_class"]["other"] is None
    network = timm.create_model(f"local-dir:{classifier}", pretrained=True).eval()
    images, view = labelled(open_images(str(digits))), PlainView((28, 28), (0.5,), (0.5,), 0.9)
    with torch.no_grad():
        predicted = network(torch.stack([view(images.load(i, Reading(1)))[1] for i in range(60)])).argmax(1)
    right = predicted == 10 - torch.tensor(images.labels)
    assert found["accuracy"] > 0.5
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))
    for part, count in (("train", 6), ("val", 2)):
        copy_digits(digits, tmp_path / "parts" / part, ("class 3", "class 7"), slice(count))
    parts = printed(capsys, "classify", str(classifier), str(tmp_path / "parts"), "--crop-pct", "none")
    assert (parts["test_images"], parts["crop_pct"]) == (4, 1.0)


def test_a_class_without_test_images(pretrained_run: Path, digits: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(digits, tmp_path / "d" / "train")
    shutil.copytree(digits / "class 3", tmp_path / "d" / "test" / "class 3")
    found = printed(capsys, "knn", str(pretrained_run), str(tmp_path / "d"))
    assert found["per_class"] == {**dict.fromkeys(CLASSES), "class 3": found["accuracy"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["knn", "MODEL", "DIGITS", "--k", "500"], "k = 500 needs as many training images, but there are 40"),
        (["knn", "MODEL", "DIGITS", "--temperature", "0"], "temperature = 0"),
        (["knn", "MODEL", "DIGITS/class 3"], "lies outside of any; move it"),
        (["knn", "MODEL", "nowhere"], "'nowhere' is neither a folder with one subfolder per class"),
        (["knn", "MODEL", "DIGITS", "--features", "all"], "features = all"),
        (["knn", "MODEL"], "lacks 'data'"),
        (["linear", "MODEL", "DIGITS", "--seeds", "0"], "seeds = 0"),
        (["classify", "MODEL", "DIGITS"], "has no classifier; fine-tune it first"),
        (["classify", "CLASSIFIER", "mnist"], "images of the classes '0', '1'"),
        (["attentive", "MODEL", "DIGITS", "--out", "DIGITS/out"], "lies inside the image folder"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    arguments: list[str],
    message: str,
    pretrained_run: Path,
    classifier: Path,
    digits: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    names = {"MODEL": str(pretrained_run), "DIGITS": str(digits), "CLASSIFIER": str(classifier)}
    filled = [names.get(part, part.replace("DIGITS/", f"{digits}/")) for part in arguments]
    assert message in refused(capsys, *filled, *out)
    assert not list(tmp_path.iterdir())


def test_images_that_the_classifier_was_trained_on_are_counted(
    pretrained_run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {**FINETUNING, "workers": 0, "steps": 1, "batch_size": 8, "model": str(pretrained_run)}
    whole, parted, few = (tmp_path / name for name in ("whole", "parted", "few"))
    for part, count in (("train", 5), ("test", 1)):
        copy_digits(digits, tmp_path / "parts" / part, CLASSES, slice(-count, None))
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
        warning = f"warning: {seen} of the {measured} images measured are among those that {run} was trained on"
        assert (warning in captured.err) == (seen > 0)
    shutil.rmtree(tmp_path / "parts")
    for run, more in ((parted, ()), (whole, ("--reinit",))):
        assert "images_trained_on" not in printed(capsys, "classify", str(run), str(digits), *more)
