"""Images of four channels and 12 bits, from files to a fine-tuned model."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from tests.conftest import QUIET, TINY, assert_same_run, pretrain_tiny

import mapet
from mapet import MapetError
from mapet.cli import main
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.jobs.evaluate.run import evaluate
from mapet.jobs.export.run import export_model
from mapet.jobs.finetune.run import finetune
from mapet.jobs.infer.run import embed_images, predict_images
from mapet.jobs.tokenizer.encode import check_tokens, encode_images
from mapet.jobs.tokenizer.fit import report_on_tokenizer

RANGE = (0.0, 4095.0)
FOUR: dict[str, Any] = {"channels": 4, "value_range": RANGE, "steps": 2}
LABELLED = {"workers": 0, "batch_size": 8}


@pytest.fixture(scope="module")
def stacks(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as arrays of four bands of 12 bits, two classes; the third band is noise, the fourth dark."""
    folder, noise = tmp_path_factory.mktemp("stacks"), np.random.default_rng(0)
    images = open_images(str(digits))
    for index in range(40):
        grey = images.load(index, Reading(1))[0].numpy().astype(np.uint16) * 16
        bands = [grey, 4080 - grey, noise.integers(0, 4000, grey.shape, np.uint16), grey // 8]
        target = folder / f"class {index % 2}" / f"{index}.npy"
        target.parent.mkdir(exist_ok=True)
        np.save(target, np.stack(bands))
    return folder


@pytest.fixture(scope="module")
def run(stacks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multispectral") / "run"
    pretrain_tiny(stacks, folder, **FOUR)
    return folder


def test_what_is_measured_is_recorded(run: Path, stacks: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    images = open_images(str(stacks))
    whole = torch.stack([images.load(index, Reading(4, RANGE)) for index in range(40)])
    assert config["value_range"] == list(RANGE)
    assert config["mean"] == pytest.approx(whole.mean(dim=(0, 2, 3)).tolist(), abs=1e-5)
    assert config["std"] == pytest.approx(whole.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-5)
    exported = json.loads((run / "exported" / "config.json").read_text())["pretrained_cfg"]
    assert (exported["mean"], exported["std"]) == (config["mean"], config["std"])
    assert exported["input_size"] == [4, 28, 28]
    network = timm.create_model(f"local-dir:{run / 'exported'}", pretrained=True)
    assert network.patch_embed.proj.in_channels == 4


def test_a_model_reads_images_as_it_was_trained(run: Path, stacks: Path) -> None:
    loaded = mapet.load(run)
    assert loaded.transform.reading == Reading(4, RANGE)
    file = next(stacks.rglob("*.npy"))
    values = torch.tensor(np.load(file).astype(np.float32)) / 4095
    mean, std = (torch.tensor(part)[:, None, None] for part in (loaded.transform.view.mean, loaded.transform.view.std))
    torch.testing.assert_close(loaded.transform(file), (values - mean) / std)
    with pytest.raises(MapetError, match=r"it has 3 channel\(s\) instead of 4"):
        loaded.transform(np.zeros((28, 28, 3), np.uint8))
    assert loaded.transform(np.moveaxis(np.load(file), 0, -1)).equal(loaded.transform(file))


def test_the_same_command_resumes_with_the_same_numbers(stacks: Path, run: Path, tmp_path: Path) -> None:
    """ "data" is measured once: a resumed run keeps the numbers, whatever the images have become."""
    values = {**TINY, "data": str(stacks), **FOUR, "value_range": "data", "mean": "data"}
    mapet.pretrain(values, tmp_path / "run", console=QUIET)
    before = (tmp_path / "run" / "config.yaml").read_text()
    low, high = yaml.safe_load(before)["value_range"]
    assert (low, 3500 < high <= 4080) == (0, True)
    assert mapet.pretrain(values, tmp_path / "run", resume=True, console=QUIET).finished
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    pretrain_tiny(stacks, tmp_path / "told", **{**FOUR, "value_range": [low, high]})
    assert_same_run(tmp_path / "run", tmp_path / "told")
    with pytest.raises(MapetError, match="'value_range' is .* but the run in .* began with"):
        mapet.pretrain({**values, "value_range": [0, 7]}, tmp_path / "run", resume=True, console=QUIET)
    pretrain_tiny(stacks, tmp_path / "more", channels=4, steps=1, init=str(run))
    more = yaml.safe_load((tmp_path / "more" / "config.yaml").read_text())
    assert (more["value_range"], more["mean"]) == (
        list(RANGE),
        yaml.safe_load((run / "config.yaml").read_text())["mean"],
    )


def test_what_follows_pre_training(run: Path, stacks: Path, tmp_path: Path) -> None:
    found = evaluate("knn", {"model": str(run), "data": str(stacks), **LABELLED}, console=QUIET)
    assert 0 <= found["accuracy"] <= 1
    embedded = embed_images({"model": str(run), "data": str(stacks), **LABELLED}, tmp_path / "x.parquet", console=QUIET)
    assert (embedded.images, embedded.damaged) == (40, 0)
    values = {"model": str(run), "data": str(stacks), **LABELLED, "steps": 2}
    with pytest.raises(MapetError, match="takes 4 channels, and timm's policies .* pass --augment none"):
        finetune(values, tmp_path / "refused", console=QUIET)
    finetune({**values, "augment": None}, tmp_path / "tuned", console=QUIET)
    assert mapet.load(tmp_path / "tuned").transform.reading == Reading(4, RANGE)
    predicted = {"model": str(tmp_path / "tuned"), "data": str(stacks), **LABELLED}
    assert predict_images(predicted, tmp_path / "x.csv", console=QUIET).images == 40


@pytest.mark.parametrize("form", ["timm", "torch"])
def test_exports_say_how_images_are_read(
    form: str,
    run: Path,
    stacks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / ("exported" if form == "timm" else "x.pt2")
    assert export_model(form, {"model": str(run), "check_images": 8}, out)["input_size"] == [4, 28, 28]
    if form == "timm":
        card = ModelCard.load(out / "README.md").text
        assert "28 x 28 pixels, 4 channels" in card
        assert "values from 0 to 4095 become 0 to 1" in card
        assert mapet.load(out).transform.reading == Reading(4, RANGE)
        monkeypatch.chdir(out)
        shutil.copy(next(stacks.rglob("*.npy")), "image.tif")
        exec(card.split("```python\n")[1].split("```")[0], {})
        assert capsys.readouterr().out.strip() == "torch.Size([1, 32])"
    else:
        described = {"mapet.json": ""}
        torch.export.load(out, extra_files=described)
        assert json.loads(described["mapet.json"])["value_range"] == list(RANGE)


def test_tokenizers_and_stores(run: Path, stacks: Path, tmp_path: Path) -> None:
    values = {"data": str(stacks), "tokenizer": str(run), "workers": 0, "value_range": RANGE}
    report = report_on_tokenizer(values, tmp_path / "report", console=QUIET)
    assert report.images == 40
    encode_images({**values, "views": 2}, tmp_path / "tokens", console=QUIET)
    assert check_tokens({"tokens": str(tmp_path / "tokens"), "data": str(stacks)}, console=QUIET)["ok"]
    told = {**FOUR, "tokens": str(tmp_path / "tokens"), "vocab_size": None}
    pretrain_tiny(stacks, tmp_path / "stored", **{**told, "value_range": None})
    assert yaml.safe_load((tmp_path / "stored" / "config.yaml").read_text())["value_range"] == list(RANGE)
    with pytest.raises(MapetError, match=r"was made with value_range \(0.0, 4095.0\).*pass --value-range 0.0 4095.0"):
        pretrain_tiny(stacks, tmp_path / "other", **{**told, "value_range": (0, 5)})


def test_teachers_of_other_channels(run: Path, stacks: Path, digits: Path, tmp_path: Path) -> None:
    own = {**FOUR, "targets": "features", "teacher": str(run / "exported"), "vocab_size": None}
    assert pretrain_tiny(stacks, tmp_path / "own", **own).finished
    for values in ({**own, "teacher": "mapet-micro-fashion-mnist"}, {**FOUR, "tokenizer": "mapet-micro-fashion-mnist"}):
        with pytest.raises(MapetError, match=r"teacher .* images of 4 channel\(s\) cannot be converted to the 1"):
            pretrain_tiny(stacks, tmp_path / "refused", **values)
    with pytest.raises(MapetError, match=r"images of 1 channel\(s\) cannot be converted to the 4"):
        pretrain_tiny(digits, tmp_path / "refused", **{**own, "channels": 1})


def test_images_that_do_not_fit_are_named(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MapetError, match=r"cannot be read, the first being .* \(ValueError: it has 1 channel\(s\) instead of 4"
    ):
        pretrain_tiny(digits, tmp_path / "run", channels=4, steps=2)


def test_one_bad_image_does_not_stop_a_run(stacks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither infinite values, nor a range that overflows, nor a file that is too large or does not end."""
    shutil.copytree(stacks, tmp_path / "data")
    wide = np.zeros((4, 28, 28), np.float32)
    wide[0, 0, :2] = -3e38, 3e38
    np.save(tmp_path / "data" / "wide.npy", wide)
    np.save(tmp_path / "data" / "infinite.npy", np.full((4, 28, 28), np.inf))
    with (tmp_path / "data" / "sparse.npy").open("wb") as file:
        file.truncate(8 * 2**40)
    np.save(tmp_path / "data" / "large.npy", np.zeros((4, 100, 100), np.uint8))
    tiny = ["--model", "vit_tiny_patch16_224", "--image-size", "28", "--patch-size", "7", "--channels", "4"]
    tiny += ["--model-args", "depth=1", "embed_dim=32", "num_heads=2", "--vocab-size", "16", "--workers", "0"]
    limits = ["--max-damaged", "0.1", "--max-pixels", "5000", "--epochs", "1", "--batch-size", "44", "--mean", "data"]
    assert main(["pretrain", str(tmp_path / "data"), *tiny, *limits, "--out", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    for name, reason in (
        ("wide.npy", "the values from -3e+38 to 3e+38 are too far apart for float32"),
        ("infinite.npy", "the image contains NaN or infinity"),
        ("sparse.npy", "8796093022208 bytes are more than --max-bytes"),
        ("large.npy", "100 x 100 pixels are more than --max-pixels 5000"),
    ):
        assert f"skipped damaged image {name}" in said
        assert reason in said
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["damaged"] == 4
    assert np.isfinite(last["loss"])
