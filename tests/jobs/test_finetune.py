from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import mapet
from mapet import MapetError
from mapet.jobs.demo.run import FINETUNING
from mapet.jobs.finetune.run import finetune
from mapet.jobs.pretrain.run import pretrain
from mapet.models.export import export_network
from mapet.probes.classifier import score_classifier

QUIET = Console(quiet=True)
PLAIN: dict[str, Any] = {**FINETUNING, "workers": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported backbone for grey images of 28 pixels."""
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=7,
        in_chans=1,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        global_pool="avg",
        fc_norm=False,
    )
    folder = tmp_path_factory.mktemp("exported")
    export_network(network, folder, (0.13,), (0.31,))
    return folder


def curve(out: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


def test_it_learns(model: Path, tmp_path: Path) -> None:
    values = {**PLAIN, "model": str(model), "data": "mnist", "steps": 120, "lr": 1e-2, "crop_min": 1.0}
    found = finetune({**values, "labels_per_class": 40, "eval_every": 100}, tmp_path / "run", console=QUIET)
    assert found.scores is not None
    assert found.scores.accuracy > 0.3
    assert json.loads((tmp_path / "run" / "results.json").read_text())["accuracy"] == found.scores.accuracy
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["eval_accuracy"] == found.scores.accuracy


def test_what_is_exported_is_the_classifier(model: Path, digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = {**PLAIN, "model": str(model), "data": str(digits), "steps": 3, "batch_size": 8, "crop_pct": 0.9}
    finetune(values, run, console=QUIET)
    loaded = mapet.load(run)
    assert loaded.classes == tuple(f"class {digit}" for digit in range(10))
    network = timm.create_model(f"local-dir:{run / 'exported'}", pretrained=True).eval()
    assert (network.pretrained_cfg["crop_pct"], network.pretrained_cfg["tag"]) == (0.9, "finetuned")
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(network(images), loaded.model(images))
    kept = load_file(run / "checkpoints" / "last" / "objective.safetensors")
    assert all(torch.equal(kept[f"network.{name}"], tensor) for name, tensor in network.state_dict().items())
    before = load_file(model / "model.safetensors")
    assert not any(torch.equal(before[name], kept[f"network.{name}"]) for name in ("blocks.0.attn.qkv.weight",))


EVERYTHING: dict[str, Any] = {
    "steps": 40,
    "checkpoint_every": 4,
    "batch_size": 12,
    "accumulate": 2,
    "workers": 1,
    "ema_decay": 0.9,
    "drop_path": 0.2,
    "layer_decay": 0.7,
    "lr": 1e-3,
}


def test_a_killed_run_resumes_bit_for_bit_without_its_source(model: Path, digits: Path, tmp_path: Path) -> None:
    """With every augmentation, mixing, moving average and stochastic depth."""
    finetune({**EVERYTHING, "model": str(model), "data": str(digits)}, tmp_path / "whole", console=QUIET)
    source, out = tmp_path / "source", tmp_path / "killed"
    shutil.copytree(model, source)
    flags = [part for key, value in EVERYTHING.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "mapet", "finetune", str(source), str(digits), "--out", str(out), *flags]
    process = subprocess.Popen([*command, "--resume"], stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_bytes().split(b"\n")) > 7:
            process.kill()
        time.sleep(0.005)
    assert process.returncode == -signal.SIGKILL
    shutil.rmtree(source)
    finetune({}, out, resume=True, console=QUIET)
    assert curve(out) == curve(tmp_path / "whole")
    same = [(path / "exported" / "model.safetensors").read_bytes() for path in (out, tmp_path / "whole")]
    assert same[0] == same[1]
    kept = load_file(out / "checkpoints" / "last" / "objective.safetensors")
    assert kept["updates"] == 40
    exported = load_file(out / "exported" / "model.safetensors")
    assert all(torch.equal(kept[f"ema.module.{name}"], tensor) for name, tensor in exported.items())
    assert not torch.equal(kept["network.head.weight"], exported["head.weight"])


@pytest.mark.slow
def test_two_processes_train_on_the_images_of_one(model: Path, digits: Path, tmp_path: Path) -> None:
    flags = [
        "--steps",
        "3",
        "--batch-size",
        "8",
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--drop-path",
        "0",
        "--workers",
        "0",
        "--ema-decay",
        "0.9",
    ]
    single = [sys.executable, "-m"]
    double = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    for out, launch in ((tmp_path / "one", single), (tmp_path / "two", double)):
        command = [*launch, "mapet", "finetune", str(model), str(digits), "--out", str(out), *flags]
        subprocess.run(command, check=True, capture_output=True)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in two], rel=1e-4)


def test_it_is_measured_as_the_export_says(
    digits: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bilinear, seen = tmp_path / "bilinear", []
    bilinear.mkdir()
    export_network(mapet.load(model).model, bilinear, (0.13,), (0.31,), interpolation="bilinear")
    assert mapet.load(bilinear).transform.view.interpolation == "bilinear"

    def spy(network: torch.nn.Module, images: Any, view: Any, *rest: Any, **more: Any) -> Any:
        seen.append(view)
        return score_classifier(network, images, view, *rest, **more)

    monkeypatch.setattr(sys.modules[finetune.__module__], "score_classifier", spy)
    finetune(
        {**PLAIN, "model": str(bilinear), "data": str(digits), "steps": 1, "batch_size": 8},
        tmp_path / "run",
        console=QUIET,
    )
    assert set(seen) == {mapet.load(tmp_path / "run").transform.view}
    assert len(seen) == 1, "what the loop measured after its last step is the result"
    before = (tmp_path / "run" / "results.json").read_text()
    (tmp_path / "run" / "results.json").unlink()
    finetune({}, tmp_path / "run", resume=True, console=QUIET)
    assert len(seen) == 2
    assert (tmp_path / "run" / "results.json").read_text() == before


def test_a_random_network_is_another_and_seeded(model: Path, digits: Path, tmp_path: Path) -> None:
    values = {**PLAIN, "model": str(model), "data": str(digits), "steps": 1, "batch_size": 8}
    losses = []
    for number, more in enumerate(({}, {"reinit": True}, {"reinit": True}, {"reinit": True, "seed": 1})):
        finetune({**values, **more}, tmp_path / str(number), console=QUIET)
        losses.append(curve(tmp_path / str(number))[0][1])
    assert losses[1] == losses[2]
    assert len(set(losses)) == 3


def test_the_classifier_reads_what_is_asked_for(model: Path, digits: Path, tmp_path: Path) -> None:
    values = {**PLAIN, "model": str(model), "data": str(digits), "steps": 1, "batch_size": 8}
    for pool, timms in ((None, "avg"), ("mean", "avg"), ("class", "token")):
        out = tmp_path / str(pool)
        finetune({**values, "pool": pool}, out, console=QUIET)
        assert mapet.load(out).model.global_pool == timms


def test_another_image_size(model: Path, digits: Path, tmp_path: Path) -> None:
    values = {**PLAIN, "model": str(model), "data": str(digits), "steps": 1, "batch_size": 8, "image_size": (42, 28)}
    finetune(values, tmp_path / "run", console=QUIET)
    loaded = mapet.load(tmp_path / "run")
    assert loaded.model(torch.randn(1, 1, 42, 28)).shape == (1, 10)
    assert loaded.transform.view.size == (42, 28)


def refused(tmp_path: Path, values: dict[str, Any], says: str, **how: Any) -> None:
    with pytest.raises(MapetError, match=says):
        finetune(values, tmp_path / "run", console=QUIET, **how)
    assert not (tmp_path / "run" / "config.yaml").exists() or how


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label_share": 0.5, "labels_per_class": 2}, "give label_share or labels_per_class, not both"),
        ({"labels_per_class": 9}, r"class 'class 0' of .* has 5 image\(s\), fewer than the 9 asked for"),
        ({"batch_size": 7, "mixup": 0.8}, "7 at a time is odd; take --batch-size 8"),
        ({"augment": "rand-nonsense"}, "augment = 'rand-nonsense': none of timm's policies"),
        ({"augment": "magic"}, "augment = 'magic': none of timm's policies"),
        ({"batch_size": 512}, "batch size 512 is larger than the data set of 50 images"),
        ({"model": "vit_tiny_patch16_225"}, "unknown model 'vit_tiny_patch16_225'"),
        ({"image_size": 30}, "30 is not divisible by its patch size 7"),
        ({"model": "resnet10t", "reinit": True, "pool": "mean"}, "--pool is for Vision Transformers"),
        ({"model": "vgg11", "reinit": True, "drop_path": 0.1}, "'vgg11' has no stochastic depth; pass --drop-path 0"),
        ({"augment": "rand-w7"}, "none of timm's policies"),
        ({"lr": 1e300}, "lr = 1e[+]300: input should be less than or equal to"),
        ({"image_size": [14]}, "lacks 'image_size.1'"),
        (
            {"model": "resnet10t", "reinit": True, "batch_size": 1},
            "'resnet10t' has batch norm.*take a larger --batch-size",
        ),
        (
            {"model": "resnet10t", "reinit": True, "accumulate": 8},
            "has batch norm, .* but it would see one at a time; .* smaller --accumulate",
        ),
        ({"image_size": "0x38"}, "image_size"),
        ({"pool": "max"}, "pool = 'max'"),
        ({"data": "/no/where"}, "neither a folder with one subfolder per class"),
    ],
)
def test_bad_values(change: dict[str, Any], says: str, model: Path, digits: Path, tmp_path: Path) -> None:
    refused(tmp_path, {**PLAIN, "model": str(model), "data": str(digits), "batch_size": 8, **change}, says)


def test_bad_labels(model: Path, digits: Path, tmp_path: Path) -> None:
    values = {**PLAIN, "model": str(model), "batch_size": 2}
    (tmp_path / "one").mkdir()
    shutil.copytree(digits / "class 0", tmp_path / "one" / "only")
    refused(tmp_path, {**values, "data": str(tmp_path / "one")}, "the single class 'only'")
    shutil.copytree(digits / "class 0", tmp_path / "flat")
    refused(tmp_path, {**values, "data": str(tmp_path / "flat")}, "needs one subfolder per class")
    for part, classes in (("train", "01"), ("test", "02")):
        for digit in classes:
            shutil.copytree(digits / f"class {digit}", tmp_path / "unseen" / part / digit)
    refused(tmp_path, {**values, "data": str(tmp_path / "unseen")}, "of the class '2', which .*train does not have")


def test_broken_models(model: Path, digits: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    values = {**PLAIN, "model": str(broken), "data": str(digits), "batch_size": 8}
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "norm.weight": tensors["norm.weight"] * float("nan")}, broken / "model.safetensors")
    refused(tmp_path, values, "contain NaN or infinity .first 'norm.weight'")
    save_file({name: tensor for name, tensor in tensors.items() if name != "norm.weight"}, broken / "model.safetensors")
    refused(tmp_path, values, "cannot be read .*norm.weight")
    whole = (model / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, values, "cannot be read .* cut short")


def test_other_labels_are_refused_on_resume(model: Path, digits: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    values = {**PLAIN, "model": str(model), "data": str(data), "batch_size": 8, "steps": 2}
    finetune(values, tmp_path / "run", console=QUIET)
    (data / "class 9").rename(data / "class A")
    refused(tmp_path, {}, "'data' changed since the run", resume=True)
    (data / "class A").rename(data / "class 9")
    refused(tmp_path, {"mixup": 0.5}, "'mixup' is 0.5, but the run .* began with 0.0", resume=True)


@pytest.mark.parametrize("key", ["layer_decay", "augment", "ema_decay"])
def test_none_is_a_change_too(key: str, model: Path, digits: Path, tmp_path: Path) -> None:
    values = {**PLAIN, "layer_decay": 0.9, "augment": "rand-m9", "ema_decay": 0.9}
    values |= {"model": str(model), "data": str(digits), "batch_size": 8, "steps": 1}
    finetune(values, tmp_path / "run", console=QUIET)
    refused(tmp_path, {key: None}, f"{key!r} is None, but the run .* began with", resume=True)


def test_a_kill_between_renames_leaves_the_export_to_resume_from(model: Path, digits: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "run"
    shutil.copytree(model, source)
    values = {**PLAIN, "model": str(source), "data": str(digits), "batch_size": 8, "steps": 2}
    finetune(values, out, console=QUIET)
    shutil.rmtree(source)
    (out / "exported").rename(out / ".exported.old")
    assert finetune({}, out, resume=True, console=QUIET).steps == 2
    assert (out / "exported").is_dir()


def test_a_run_of_another_command_is_not_continued(model: Path, digits: Path, tmp_path: Path) -> None:
    values = {**PLAIN, "model": str(model), "data": str(digits), "batch_size": 8, "steps": 1}
    finetune(values, tmp_path / "run", console=QUIET)
    with pytest.raises(MapetError, match="holds the run of another command, whose configuration has"):
        pretrain({}, tmp_path / "run", resume=True, console=QUIET)
    with pytest.raises(MapetError, match="holds 'config.json', but no run"):
        finetune(values, model, console=QUIET)
