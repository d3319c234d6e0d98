"""Pre-training: the run folder, resuming, damaged input, several processes."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from rich.console import Console
from tests.conftest import (
    QUIET,
    TINY,
    StoppingFile,
    assert_same_run,
    checkpoint,
    checkpoint_state,
    curve,
    kill_after,
    mapet_command,
    pretrain_tiny,
    records,
    resume_pretraining,
    under_torchrun,
    wait_for_records,
)

from mapet import MapetError
from mapet.cli import main
from mapet.engine.parallel import product_speed
from mapet.engine.trainer import Trainer
from mapet.jobs.pretrain.flops import count_flops
from mapet.jobs.pretrain.run import pretrain
from mapet.jobs.pretrain.settle import settle_run

FILES = {
    *(".lock", "config.yaml", "log.txt", "metrics.jsonl", "baseline.json"),
    *("tokenizer/tokenizer.json", "tokenizer/tokenizer.safetensors"),
    *(
        f"checkpoints/{step}/{name}"
        for step in ("last", "step-00000009")
        for name in ("task.safetensors", "optimizer.safetensors", "state.json")
    ),
    *("exported/config.json", "exported/model.safetensors"),
    *("figures/curve.png", "figures/layout.png", "figures/tokens.png"),
}
ENTRIES = {"step", "epoch", "images", "loss", "accuracy", "lr", "grad_norm", "images_per_s", "data_wait", "damaged"}


def command(data: Path, out: Path, *flags: str, **values: Any) -> list[str]:
    return mapet_command("pretrain", {**TINY, "data": str(data), **values}, out, *flags)


def test_run_folder(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = pretrain_tiny(digits, out, steps=9, eval_data=str(digits), eval_every=1)
    assert (result.steps, result.total_steps, result.stopped_by) == (9, 9, None)
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("tensorboard/events")}
    assert len(events) == 1
    assert files - events == FILES
    # The export is written before the checkpoint: a run that is killed between them exports again.
    assert (out / "exported").stat().st_mtime_ns <= (out / "checkpoints" / "last").stat().st_mtime_ns
    assert [record["step"] for record in records(out)] == list(range(9))
    measured = {"eval_knn", "eval_linear"}
    assert [set(record) - ENTRIES for record in records(out)] == [set()] * 6 + [measured, set(), measured]
    assert result.measured == {name: records(out)[-1][name] for name in measured}
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["mask_ratio"], config["masking"], config["patch_size"], config["lr"]) == (0.75, "random", 7, 1e-3)
    assert config["precision"] != "auto"
    exported = timm.create_model(f"local-dir:{out / 'exported'}", pretrained=True).eval()
    assert exported.pretrained_cfg["tag"] == "mapet"
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(exported(images), result.task.outcome().eval()(images))


def test_share_of_the_devices_speed(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flops = count_flops(settle_run({**TINY, "data": str(digits)}, 64, 1), 8)
    # As on a GPU; on a CPU, whose cores may be shared, pre-training does not measure the share.
    monkeypatch.setattr("mapet.jobs.pretrain.run.Trainer", lambda **values: Trainer(**{**values, "flops": flops}))
    monkeypatch.setattr("mapet.engine.trainer.product_speed", lambda device, precision: 1e12)
    pretrain_tiny(digits, tmp_path / "run", steps=2)
    for record in records(tmp_path / "run"):
        assert record["mfu"] == pytest.approx(record["images_per_s"] * flops / 1e12)
    assert product_speed(torch.device("cpu"), "no") > 1e8


def test_default_batch_size_of_few_images(digits: Path, tmp_path: Path) -> None:
    values = {key: value for key, value in TINY.items() if key not in ("batch_size", "lr")}
    result = pretrain({**values, "data": str(digits), "steps": 1}, tmp_path / "run", console=QUIET)
    assert (result.config.batch_size, result.config.lr) == (4, pytest.approx(1.875e-4))
    assert resume_pretraining(tmp_path / "run").config == result.config


def test_killed_run_resumes_bit_for_bit(digits: Path, tmp_path: Path) -> None:
    """SIGKILL twice, at any point of a step; with loading workers, stochastic depth and micro-batches."""
    options = {"steps": 60, "checkpoint_every": 5, "workers": 1, "accumulate": 2, "color_jitter": 0.4}
    pretrain_tiny(digits, tmp_path / "whole", **options)
    out = tmp_path / "killed"
    kill_after(8, command(digits, out, **options), out)
    kill_after(27, command(digits, out, "--resume", **options), out)
    resume_pretraining(out)
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_polite_stop_saves(number: signal.Signals, digits: Path, tmp_path: Path) -> None:
    """The signal goes to the whole process group, loading workers included, as SLURM and a terminal send it."""
    out = tmp_path / "run"
    arguments = command(digits, out, steps=2000, workers=1, checkpoint_every=1500)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_records(out, 3, process)
    os.killpg(process.pid, number)
    said = process.communicate()[1]
    assert process.returncode == 128 + number
    assert f"{number.name}: stopping" in said
    assert "--resume continues" in said
    assert "Traceback" not in said
    assert checkpoint_state(out)["step"] == len(records(out))


def test_resume_without_checkpoint_begins(digits: Path, tmp_path: Path) -> None:
    values = {**TINY, "data": str(digits), "steps": 3}
    pretrain(values, tmp_path / "a", resume=True, console=QUIET)
    pretrain(values, tmp_path / "b", console=QUIET)
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    pretrain(values, tmp_path / "b", resume=True, console=QUIET)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert pretrain(values, tmp_path / "b", resume=True, console=QUIET).steps == 3
    assert_same_run(tmp_path / "a", tmp_path / "b")
    for one, other in ("ab", "ba"):
        log = (tmp_path / one / "log.txt").read_text()
        assert f"{tmp_path / one}: 60 images, steps 0 to 3 of 8 images" in log
        assert str(tmp_path / other) not in log


def test_resume_needs_the_same_configuration(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain_tiny(digits, out, steps=2)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for key, value, began in (("lr", 0.1, 0.001), ("steps", 5, 2)):
        with pytest.raises(MapetError, match=f"'{key}' is {value}, but the run in .*run began with {began}"):
            resume_pretraining(out, **{key: value})
    with pytest.raises(MapetError, match="already holds a run"):
        pretrain_tiny(digits, out, steps=2)
    assert {path: path.read_bytes() for path in before} == before
    same = {**TINY, "data": str(digits), "steps": 2, "mean": [0.449]}
    not_given = {"epochs": None, "mask_ratio": None, "views": None, "precision": "auto"}
    free = {"log_every": 2, "checkpoint_every": 1, "max_damaged": 0.5}
    config = resume_pretraining(out, **same, **not_given, **free).config
    assert (config.mask_ratio, config.log_every) == (0.75, 2)


def test_resume_needs_the_same_images(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "images")
    pretrain_tiny(tmp_path / "images", tmp_path / "run", steps=2)
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    resume_pretraining(tmp_path / "run", data=str(moved))
    (moved / "class 3" / "1.png").unlink()
    with pytest.raises(MapetError, match="'data' changed.*it had 60 images, now there are 59"):
        resume_pretraining(tmp_path / "run", data=str(moved))


def test_resume_needs_the_same_tokenizer(digits: Path, tmp_path: Path) -> None:
    pretrain_tiny(digits, tmp_path / "run", steps=2)
    pretrain_tiny(digits, tmp_path / "other", steps=2, seed=1)
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    shutil.copytree(tmp_path / "other" / "tokenizer", tmp_path / "run" / "tokenizer")
    with pytest.raises(MapetError, match="the tokenizer or token store is not what the run in"):
        resume_pretraining(tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.yaml", "data: x\n", "config.yaml lacks '.+', so it was cut short or edited"),
        ("checkpoints/last/state.json", "{}", "checkpoints/last is damaged"),
        (
            "checkpoints/last/state.json",
            '{"step": 2, "total_steps": 4, "made_from": {}}',
            "checkpoints/last is damaged",
        ),
        ("checkpoints/last/task.safetensors", "cut", "checkpoints/last is damaged"),
        ("baseline.json", '{"unigram', None),
        ("metrics.jsonl", 'rubbish\n5\n{"step": "1"}\n{"step": 0}\n', None),
    ],
)
def test_damaged_files(file: str, content: str, says: str | None, pretrained_run: Path, tmp_path: Path) -> None:
    """A run with a damaged configuration or checkpoint is refused; damaged records stop no run."""
    run = Path(shutil.copytree(pretrained_run, tmp_path / "run"))
    (run / file).write_text(content)
    if says is not None:
        with pytest.raises(MapetError, match=says):
            resume_pretraining(run)
    else:
        resume_pretraining(run)
        assert json.loads((run / "baseline.json").read_text())["entropy"] > 1


def test_failed_measurement_loses_no_step(digits: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        shutil.copytree(digits, tmp_path / "labelled" / part)
    for file in (tmp_path / "labelled" / "test").rglob("*.png"):
        file.write_bytes(b"cut")
    with pytest.raises(MapetError, match="cannot be read"):
        pretrain_tiny(digits, tmp_path / "run", steps=3, eval_data=str(tmp_path / "labelled"))
    assert checkpoint_state(tmp_path / "run")["step"] == 3
    assert resume_pretraining(tmp_path / "run", eval_data=None).config.eval_data is None


def test_damaged_images_are_skipped_and_logged(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Path(shutil.copytree(digits, tmp_path / "images"))
    (images / "class 5" / "2.png").write_bytes(b"cut")
    Path(os.fsdecode(os.fsencode(images) + b"/caf\xe9.png")).write_bytes(b"cut")  # a name that is not Unicode
    options = {"epochs": 1, "batch_size": 61}
    pretrain_tiny(images, tmp_path / "run", **options)
    assert records(tmp_path / "run")[-1]["damaged"] == 2
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "skipped damaged image class 5/2.png" in log
    assert r"skipped damaged image caf\udce9.png" in log
    assert "Logging error" not in capsys.readouterr().err
    with pytest.raises(MapetError, match="2 of 61 images cannot be read.*--max-damaged"):
        pretrain_tiny(images, tmp_path / "strict", **options, max_damaged=0.01)
    assert not (tmp_path / "strict" / "config.yaml").exists()


def test_output_folder_among_the_images_is_refused(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "images")
    with pytest.raises(MapetError, match="lies inside the image folder"):
        pretrain_tiny(tmp_path / "images", tmp_path / "images" / "run", steps=2)
    assert not (tmp_path / "images" / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_half_precision_needs_a_gpu(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match="precision 'fp16' needs a GPU"):
        pretrain_tiny(digits, tmp_path / "run", precision="fp16")
    assert not (tmp_path / "run").exists()


def test_fitted_tokenizer(pretrained_run: Path, digits: Path, tmp_path: Path) -> None:
    tokenizer = str(pretrained_run / "tokenizer")
    pretrain_tiny(digits, tmp_path / "again", steps=2, tokenizer=tokenizer)
    assert curve(tmp_path / "again") == curve(pretrained_run)
    for change, says in (
        ({"patch_size": 4}, r"gives 4 x 4 ids an image, but the model has 7 x 7 patches"),
        ({"channels": 3}, r"images have shape \(3, 28, 28\), but this tokenizer reads \(1, 28, 28\)"),
        ({"vocab_size": 9}, "is fitted and has 16 ids; leave --vocab-size out"),
        ({"tokenizer": str(digits)}, "holds neither a tokenizer nor an exported backbone"),
    ):
        with pytest.raises(MapetError, match=says):
            pretrain_tiny(digits, tmp_path / "other", **{"steps": 2, "tokenizer": tokenizer, **change})
        assert not (tmp_path / "other" / "config.yaml").exists()


def test_divergence_stops_with_its_cause(digits: Path, tmp_path: Path) -> None:
    wild = {"lr": 1e3, "weight_decay": 1e3, "clip_grad": 1e30, "warmup": 0.0}
    run = tmp_path / "run"
    says = r"step \d+: loss .*overflowed.*start another run with a lower --lr.*; --branch-of .*/run --lr"
    with pytest.raises(MapetError, match=says) as first:
        pretrain_tiny(digits, run, steps=200, checkpoint_every=1, **wild)
    assert all(tensor.isfinite().all() for tensor in checkpoint(run).values())
    assert f"No weight was changed since step {checkpoint_state(run)['step']}, " in str(first.value)
    step = checkpoint_state(run)["step"]
    with pytest.raises(MapetError, match=f"overflowed.*No weight was changed since step {step}, from where --resume"):
        resume_pretraining(run)


def test_a_step_without_finite_gradients_is_skipped(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clipped, norms, broken = Accelerator.clip_grad_norm_, itertools.count(), {3}

    def overflowing(self: Accelerator, parameters: Any, most: float) -> torch.Tensor:
        parameters = list(parameters)
        if next(norms) in broken:
            parameters[0].grad.fill_(float("inf"))
        return clipped(self, parameters, most)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", overflowing)
    pretrain_tiny(digits, tmp_path / "run", steps=8)
    assert "step 3 is skipped: loss" in caplog.text
    assert [record["grad_norm"] is None for record in records(tmp_path / "run")] == [step == 3 for step in range(8)]
    assert all(record["loss"] is not None for record in records(tmp_path / "run"))
    broken.update(range(8 + 2, 8 + 7))
    with pytest.raises(MapetError, match=r"step 6: .*No weight was changed since step 2, from where --resume repeats"):
        pretrain_tiny(digits, tmp_path / "stops", steps=8)
    assert checkpoint_state(tmp_path / "stops")["step"] == 2


def test_a_branch_begins_with_an_earlier_checkpoint(digits: Path, tmp_path: Path) -> None:
    options = {"steps": 12, "checkpoint_every": 4, "keep": 3}
    pretrain_tiny(digits, tmp_path / "run", **options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    same, lower = tmp_path / "same", tmp_path / "lower"
    pretrain({}, same, branch_of=tmp_path / "run", from_step=4, console=QUIET)
    assert_same_run(same, tmp_path / "run")
    asked = ["--branch-of", str(tmp_path / "run"), "--from-step", "8", "--lr", "1e-4", "--out", str(lower)]
    assert main(["pretrain", *asked]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    ours, theirs = curve(lower), curve(tmp_path / "run")
    assert ours[:8] == theirs[:8]
    assert all(a["lr"] < b["lr"] and a["loss"] != b["loss"] for a, b in zip(ours[9:], theirs[9:], strict=True))
    assert json.loads((lower / "origin.json").read_text())["run"] == "run"
    for values, options, says in (
        ({"batch_size": 4}, {}, "'batch_size' is 4, but the run in .*/run began with 8"),
        ({}, {"from_step": 5}, "has kept no checkpoint of step 5, but of 4, 8, 12"),
    ):
        with pytest.raises(MapetError, match=says):
            pretrain(values, tmp_path / "new", branch_of=tmp_path / "run", console=QUIET, **options)
    with pytest.raises(MapetError, match="already holds a run"):
        pretrain({}, same, branch_of=tmp_path / "run", console=QUIET)
    with pytest.raises(MapetError, match="is no run folder"):
        pretrain({}, tmp_path / "new", branch_of=tmp_path, console=QUIET)


def _limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))


def test_full_disk(digits: Path, tmp_path: Path) -> None:
    """A limit on the size of files makes the same writes fail that a full disk does."""
    out = tmp_path / "run"
    options = {"steps": 4, "checkpoint_every": 2}
    failed = subprocess.run(
        command(digits, out, **options), capture_output=True, text=True, preexec_fn=_limit_file_size
    )
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert f"{out} cannot be written to (Error while serializing: I/O error: File too large" in failed.stderr
    assert not (out / "checkpoints" / "last").exists()
    resume_pretraining(out)
    pretrain_tiny(digits, tmp_path / "whole", **options)
    assert_same_run(out, tmp_path / "whole")


def test_the_curve_does_not_depend_on_the_number_of_processes(digits: Path, tmp_path: Path) -> None:
    """Nor on micro-batches; also if a run goes on with other numbers. There is one run folder."""
    options: dict[str, Any] = {
        "masking": "blockwise",
        "steps": 6,
        "drop_path": 0.2,
        "batch_size": 16,
        "precision": "no",
    }
    pretrain_tiny(digits, tmp_path / "one", **options)
    many = tmp_path / "many"
    values = {**TINY, "data": str(digits), "accumulate": 4, **options}
    stopped = pretrain(values, many, console=Console(file=StoppingFile()))
    assert not stopped.finished
    done = subprocess.run(
        under_torchrun(command(digits, many, "--resume", accumulate=2, **options)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint_state(many)["made_from"]["processes"] == 2
    assert done.stderr.count("done: ") == 1
    one, two = records(tmp_path / "one"), records(many)
    assert [record["step"] for record in two] == [0, 1, 2, 3, 4, 5]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_photographs_with_ids_of_real_features(photographs: Path, mobilenet_weights: Path, tmp_path: Path) -> None:
    """A ViT-Tiny/16 learns 20 ImageNet photographs of 224 pixels, whose ids are clustered MobileNetV2 features."""
    student = {"model": "vit_tiny_patch16_224", "image_size": 224, "drop_path": 0.0, "layer_scale": None}
    teacher = {"tokenizer": "mobilenet_v2", "teacher_stage": "features.13", "teacher_weights": str(mobilenet_weights)}
    views = {"crop_min": 1.0, "flip": 0.0, "color_jitter": 0.0}
    training = {"steps": 30, "batch_size": 4, "lr": 1e-3, "warmup": 0.1, "beta2": 0.98}
    values = {"data": str(photographs), "vocab_size": 32, **student, **teacher, **views, **training}
    pretrain(values, tmp_path / "run", console=QUIET)
    losses = [record["loss"] for record in records(tmp_path / "run")]
    unigram = json.loads((tmp_path / "run" / "baseline.json").read_text())["entropy"]
    assert losses[0] > unigram
    assert sum(losses[-4:]) / 4 < unigram
