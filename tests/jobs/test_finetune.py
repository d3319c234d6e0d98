"""Fine-tuning: learning, resuming, what is exported, and what is refused."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import QUIET, assert_same_run, checkpoint, kill_after, mapet_command, records, under_torchrun

import mapet
from mapet import MapetError
from mapet.data.open import open_labelled
from mapet.data.reading import Reading
from mapet.jobs.demo.run import FINETUNING
from mapet.jobs.finetune.run import finetune
from mapet.models.export import export_network
from mapet.probes.labelled import score_classifier, summarise

PLAIN: dict[str, Any] = {**FINETUNING, "workers": 0, "batch_size": 8}  # without augmentation


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported backbone for grey images of 28 pixels, which pools the mean of its patches."""
    torch.manual_seed(0)
    sizes = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=0, global_pool="avg", fc_norm=False)
    folder = tmp_path_factory.mktemp("exported")
    export_network(network, folder, (0.13,), (0.31,))
    return folder


def tune(model: Path | str, data: Path | str, out: Path, **values: Any) -> Any:
    return finetune({**PLAIN, "model": str(model), "data": str(data), **values}, out, console=QUIET)


def resume(out: Path, **values: Any) -> Any:
    return finetune(values, out, resume=True, console=QUIET)


def test_learning(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = {"steps": 120, "batch_size": 32, "lr": 1e-2, "crop_min": 1.0}
    result = tune(model, "mnist", run, labels_per_class=40, eval_every=100, **training)
    accuracy = result.measured["accuracy"]
    assert accuracy > 0.3
    assert json.loads((run / "results.json").read_text()) == result.measured
    first, last = records(run)[0], records(run)[-1]
    assert last["loss"] < first["loss"]
    assert last["eval_accuracy"] == accuracy
    assert "400 images" in (run / "log.txt").read_text()


def test_classifier_is_exported(pretrained_run: Path, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tune(pretrained_run, digits, run, steps=3, crop_pct=0.9)
    loaded = mapet.load(run)
    assert loaded.classes == tuple(f"class {digit}" for digit in range(10))
    network = timm.create_model(f"local-dir:{run / 'exported'}", pretrained=True).eval()
    assert (network.pretrained_cfg["crop_pct"], network.pretrained_cfg["tag"]) == (0.9, "finetuned")
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(network(images), loaded.model(images))
    trained, before = checkpoint(run), load_file(pretrained_run / "exported" / "model.safetensors")
    assert all(torch.equal(trained[f"network.{name}"], tensor) for name, tensor in network.state_dict().items())
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], trained["network.blocks.0.attn.qkv.weight"])
    origin = json.loads((run / "origin.json").read_text())
    assert (origin["run"], origin["config"]["objective"]) == ("run", "mapet")


def test_killed_run_resumes_bit_for_bit_without_its_source(model: Path, digits: Path, tmp_path: Path) -> None:
    """With augmentation, mixup, cutmix, erasing, layer decay, a moving average and stochastic depth."""
    source, out = Path(shutil.copytree(model, tmp_path / "source")), tmp_path / "killed"
    values: dict[str, Any] = {"model": str(source), "data": str(digits), "steps": 40, "checkpoint_every": 4}
    values |= {"batch_size": 12, "accumulate": 2, "workers": 1, "lr": 1e-3, "ema_decay": 0.9, "drop_path": 0.2}
    finetune(values, tmp_path / "whole", console=QUIET)
    kill_after(7, mapet_command("finetune", values, out, "--resume"), out)
    shutil.rmtree(source)
    resume(out)
    assert_same_run(out, tmp_path / "whole")
    trained, exported = checkpoint(out), load_file(out / "exported" / "model.safetensors")
    assert all(torch.equal(trained[f"ema.module.{name}"], tensor) for name, tensor in exported.items())
    assert not torch.equal(trained["network.head.weight"], exported["head.weight"])


def test_kill_between_renames_leaves_an_export(model: Path, digits: Path, tmp_path: Path) -> None:
    source, out = shutil.copytree(model, tmp_path / "source"), tmp_path / "run"
    tune(source, digits, out, steps=2)
    shutil.rmtree(source)
    (out / "exported").rename(out / ".exported.old")
    assert resume(out).steps == 2
    assert (out / "exported").is_dir()


@pytest.mark.slow
def test_two_processes_equal_one(model: Path, digits: Path, tmp_path: Path) -> None:
    values = {**PLAIN, "model": str(model), "data": str(digits), "steps": 3, "ema_decay": 0.9, "precision": "no"}
    finetune(values, tmp_path / "one", console=QUIET)
    command = under_torchrun(mapet_command("finetune", values, tmp_path / "two"))
    subprocess.run(command, check=True, capture_output=True)
    one, two = ([record["loss"] for record in records(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


def test_result_is_that_of_the_export(model: Path, digits: Path, tmp_path: Path) -> None:
    """The exported network sees images with the interpolation of its training, whatever its source had."""
    bilinear, run = tmp_path / "bilinear", tmp_path / "run"
    bilinear.mkdir()
    export_network(mapet.load(model).model, bilinear, (0.13,), (0.31,), interpolation="bilinear")
    result = tune(bilinear, digits, run, steps=1)
    loaded = mapet.load(run)
    assert loaded.transform.view.interpolation == "bicubic"
    scores = score_classifier(
        loaded.model, open_labelled(str(digits), 0)[1], loaded.transform.view, Reading(1), device=torch.device("cpu")
    )
    assert result.measured == summarise([scores])
    (run / "results.json").unlink()
    assert resume(run).measured == json.loads((run / "results.json").read_text()) == result.measured


def test_random_weights_depend_on_the_seed(model: Path, digits: Path, tmp_path: Path) -> None:
    losses = []
    for number, values in enumerate(({}, {"reinit": True}, {"reinit": True}, {"reinit": True, "seed": 1})):
        tune(model, digits, tmp_path / str(number), steps=1, **values)
        losses.append(records(tmp_path / str(number))[0]["loss"])
    assert losses[1] == losses[2]
    assert len(set(losses)) == 3


def test_layer_decay_slows_the_first_blocks(model: Path, digits: Path, tmp_path: Path) -> None:
    name = "blocks.0.attn.qkv.weight"
    before = load_file(model / "model.safetensors")[name]
    moved = []
    for decay in (None, 0.1):
        run = tmp_path / str(decay)
        tune(model, digits, run, steps=2, warmup=0.0, layer_decay=decay)
        moved.append((checkpoint(run)[f"network.{name}"] - before).abs().max())
    assert moved[1] < 0.1 * moved[0]


@pytest.mark.parametrize(("pool", "timm_pool"), [(None, "avg"), ("mean", "avg"), ("class", "token")])
def test_pool(pool: str | None, timm_pool: str, model: Path, digits: Path, tmp_path: Path) -> None:
    tune(model, digits, tmp_path / "run", steps=1, pool=pool)
    assert mapet.load(tmp_path / "run").model.global_pool == timm_pool


def test_other_image_size_and_fewer_labels(model: Path, digits: Path, tmp_path: Path) -> None:
    tune(model, digits, tmp_path / "run", steps=1, image_size=(42, 28), label_share=0.6)
    assert "run: 30 images" in (tmp_path / "run" / "log.txt").read_text()
    loaded = mapet.load(tmp_path / "run")
    assert loaded.model(torch.randn(1, 1, 42, 28)).shape == (1, 10)
    assert loaded.transform.view.size == (42, 28)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label_share": 0.5, "labels_per_class": 2}, "give label_share or labels_per_class, not both"),
        ({"labels_per_class": 9}, r"class 'class 0' of .* has 5 image\(s\), fewer than the 9 asked for"),
        ({"batch_size": 7, "mixup": 0.8}, "7 at a time is odd; take --batch-size 8"),
        ({"augment": "rand-nonsense"}, "augment = .*rand-nonsense.*none of timm's policies"),
        ({"batch_size": 512}, "batch size 512 is larger than the data set of 50 images"),
        ({"image_size": 30}, "30 is not divisible by its patch size 7"),
        ({"model": "resnet10t", "reinit": True, "pool": "mean"}, "--pool is for Vision Transformers"),
        ({"model": "vgg11", "reinit": True, "drop_path": 0.1}, "'vgg11' has no stochastic depth; pass --drop-path 0"),
        ({"model": "resnet10t", "reinit": True, "batch_size": 1}, "has batch norm.*take a larger --batch-size"),
        ({"model": "resnet10t", "reinit": True, "accumulate": 8}, "has batch norm.* smaller --accumulate"),
    ],
)
def test_bad_values_are_refused(change: dict[str, Any], says: str, model: Path, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match=says):
        tune(**{"model": model, "data": digits, "out": tmp_path / "run", **change})
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_bad_labels_are_refused(model: Path, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "class 0", tmp_path / "one" / "only")
    shutil.copytree(digits / "class 0", tmp_path / "flat")
    for part, classes in (("train", "01"), ("test", "02")):
        for digit in classes:
            shutil.copytree(digits / f"class {digit}", tmp_path / "unseen" / part / digit)
    for data, says in (
        ("one", "the single class 'only'"),
        ("flat", "needs one subfolder per class"),
        ("unseen", "of the class '2', which .*train does not have"),
    ):
        with pytest.raises(MapetError, match=says):
            tune(model, tmp_path / data, tmp_path / "run", batch_size=2)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_damaged_model_is_refused(model: Path, digits: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "norm.weight": weights["norm.weight"] / 0}, broken / "model.safetensors")
    with pytest.raises(MapetError, match=r"contain NaN or infinity \(first 'norm.weight'"):
        tune(broken, digits, tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_resume_needs_the_same_labels_and_values(model: Path, digits: Path, tmp_path: Path) -> None:
    data, run = Path(shutil.copytree(digits, tmp_path / "data")), tmp_path / "run"
    tune(model, data, run, steps=2, layer_decay=0.9, augment="rand-m9")
    for change, says in (
        ({"mixup": 0.5}, "'mixup' is 0.5, but the run .* began with 0.0"),
        ({"layer_decay": None}, "'layer_decay' is None, but the run .* began with 0.9"),
        ({"augment": None}, "'augment' is None, but the run .* began with 'rand-m9'"),
    ):
        with pytest.raises(MapetError, match=says):
            resume(run, **change)
    assert resume(run, ema_decay=None, pool=None).finished, "None is not given where it is the default"
    (data / "class 9").rename(data / "class A")
    with pytest.raises(MapetError, match="'data' changed since the run"):
        resume(run)
