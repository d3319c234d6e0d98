from __future__ import annotations

import json
import logging
import os
import resource
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
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tests.conftest import TINY

from mapet import MapetError
from mapet.jobs.pretrain.run import pretrain

QUIET = Console(quiet=True)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path) -> list[tuple[Any, ...]]:
    """What must not differ between two runs: everything but the clock."""
    return [tuple(line[key] for key in ("step", "epoch", "loss", "accuracy", "lr", "grad_norm")) for line in lines(out)]


def run(data: Path, out: Path, **values: Any) -> Any:
    return pretrain({**TINY, "data": str(data), **values}, out, console=QUIET)


def command(data: Path, out: Path, *more: str, **values: Any) -> list[str]:
    recipe = out.parent / f"{out.name}.yaml"
    recipe.write_text(yaml.safe_dump({**TINY, **values}))
    return [sys.executable, "-m", "mapet", "pretrain", str(data), "--out", str(out), "--config", str(recipe), *more]


def test_a_run_folder_holds_everything(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(digits, out, steps=9, eval_data=str(digits), eval_every=1)
    assert (result.steps, result.total_steps, result.stopped_by) == (9, 9, None)
    files = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    names = {name for name in files if not name.startswith("tensorboard/events")}
    assert names == {
        ".lock",
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
        "baseline.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer.safetensors",
        "checkpoints/last/task.safetensors",
        "checkpoints/last/optimizer.safetensors",
        "checkpoints/last/state.json",
        "exported/config.json",
        "exported/model.safetensors",
        "figures/curve.png",
        "figures/layout.png",
        "figures/tokens.png",
    }
    assert len(files) == len(names) + 1
    # Where the last checkpoint is, its export is too: nothing is left to do for a run that is killed here.
    assert (out / "exported").stat().st_mtime_ns <= (out / "checkpoints" / "last").stat().st_mtime_ns
    assert [line["step"] for line in lines(out)] == list(range(9))
    first, last = lines(out)[0], lines(out)[-1]
    assert set(first) == {
        "step",
        "epoch",
        "images",
        "loss",
        "accuracy",
        "lr",
        "grad_norm",
        "images_per_s",
        "data_wait",
        "damaged",
    }
    assert set(last) - set(first) == {"eval_knn", "eval_linear"}
    assert ["eval_knn" in line for line in lines(out)] == [False] * 6 + [True, False, True]
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["mask_ratio"], config["masking"], config["patch_size"], config["lr"]) == (0.75, "random", 7, 1e-3)
    assert config["precision"] != "auto"


def test_few_images_need_no_batch_size_and_a_resumed_run_keeps_its_own(digits: Path, tmp_path: Path) -> None:
    values = {key: value for key, value in TINY.items() if key not in ("batch_size", "lr")}
    result = pretrain({**values, "data": str(digits), "steps": 1}, tmp_path / "run", console=QUIET)
    assert (result.config.batch_size, result.config.lr) == (4, pytest.approx(1.875e-4))
    assert pretrain({}, tmp_path / "run", resume=True, console=QUIET).config == result.config


def test_the_exported_backbone_is_the_trained_one(digits: Path, tmp_path: Path) -> None:
    result = run(digits, tmp_path / "run", steps=3)
    exported = timm.create_model(f"local-dir:{tmp_path / 'run' / 'exported'}", pretrained=True).eval()
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(exported(images), result.task.outcome().eval()(images))
    assert exported.pretrained_cfg["tag"] == "mapet", "the weights are not timm's"


@pytest.mark.parametrize("objective", ["pim", "mim", "raster"])
def test_every_objective_trains(objective: str, digits: Path, tmp_path: Path) -> None:
    run(digits, tmp_path / "run", objective=objective, steps=60, lr=3e-3, crop_min=1.0, flip=0.0)
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_killed_run_resumes_bit_for_bit(digits: Path, tmp_path: Path) -> None:
    """SIGKILL twice, wherever it strikes; with files decoded by workers, stochastic depth and micro-batches."""
    options = {"steps": 60, "checkpoint_every": 5, "workers": 1, "accumulate": 2, "color_jitter": 0.4}
    run(digits, tmp_path / "whole", **options)
    out = tmp_path / "killed"
    for kill_after in (8, 27, None):
        process = subprocess.Popen(command(digits, out, "--resume", **options), stderr=subprocess.DEVNULL)
        while kill_after and process.poll() is None:
            if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_bytes().split(b"\n")) > kill_after:
                process.kill()
            time.sleep(0.005)
        assert process.wait() == (-signal.SIGKILL if kill_after else 0)
    assert curve(out) == curve(tmp_path / "whole")
    same = [(path / "exported" / "model.safetensors").read_bytes() for path in (out, tmp_path / "whole")]
    assert same[0] == same[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_polite_stop_is_saved_and_resumed(number: signal.Signals, digits: Path, tmp_path: Path) -> None:
    """As SLURM and a terminal send it: to the whole process group, the loading workers included."""
    out = tmp_path / "run"
    options = {"steps": 2000, "workers": 1, "checkpoint_every": 1500}
    process = subprocess.Popen(
        command(digits, out, **options), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (out / "metrics.jsonl").exists() or len(lines(out)) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, number)
    said = process.communicate()[1]
    assert process.returncode == 128 + number
    assert f"{number.name}: stopping" in said
    assert "--resume continues" in said
    assert "Traceback" not in said
    done = len(lines(out))
    assert json.loads((out / "checkpoints" / "last" / "state.json").read_text())["step"] == done
    values = {**TINY, "data": str(digits), **options}
    with pytest.raises(MapetError, match="'steps' is 5, but the run .* began with 2000"):
        pretrain({**values, "steps": 5}, out, resume=True, console=QUIET)


def test_resume_without_a_checkpoint_begins(digits: Path, tmp_path: Path) -> None:
    values = {**TINY, "data": str(digits), "steps": 3}
    pretrain(values, tmp_path / "a", resume=True, console=QUIET)
    pretrain(values, tmp_path / "b", console=QUIET)
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    pretrain(values, tmp_path / "b", resume=True, console=QUIET)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert len(lines(tmp_path / "b")) == 3
    # A finished run has nothing left to do, and says so by doing nothing.
    assert pretrain(values, tmp_path / "b", resume=True, console=QUIET).steps == 3
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_resuming_with_another_configuration_is_refused(digits: Path, tmp_path: Path) -> None:
    run(digits, tmp_path / "run", steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    values = {**TINY, "data": str(digits), "steps": 2}
    with pytest.raises(MapetError, match=r"'lr' is 0.1, but the run in .*run began with 0.001"):
        pretrain({**values, "lr": 0.1}, tmp_path / "run", resume=True, console=QUIET)
    with pytest.raises(MapetError, match="already holds a run"):
        pretrain(values, tmp_path / "run", console=QUIET)
    assert {path: path.read_bytes() for path in before} == before
    free = {"log_every": 2, "checkpoint_every": 1, "epochs": None, "mask_ratio": None, "precision": "auto"}
    free |= {"mean": [0.449], "max_damaged": 0.5}
    assert pretrain({**values, **free}, tmp_path / "run", resume=True, console=QUIET).config.mask_ratio == 0.75


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("config.yaml", "data: x\n", "config.yaml lacks '.+', so it was cut short or edited"),
        ("checkpoints/last/state.json", "{}", "is damaged"),
        ("baseline.json", '{"unigram', None),
        (
            "checkpoints/last/state.json",
            '{"step": 2, "total_steps": 4, "made_from": {}}',
            "checkpoints/last is damaged",
        ),
        ("metrics.jsonl", 'rubbish\n5\n{"step": "1"}\n{"step": 0}\n', None),
    ],
)
def test_damaged_files_of_a_run(file: str, damage: str, says: str | None, digits: Path, tmp_path: Path) -> None:
    run(digits, tmp_path / "run", steps=2)
    (tmp_path / "run" / file).write_text(damage)
    if says is None:
        pretrain({}, tmp_path / "run", resume=True, console=QUIET)
        assert json.loads((tmp_path / "run" / "baseline.json").read_text())["entropy"] > 1
        return
    with pytest.raises(MapetError, match=says):
        pretrain({}, tmp_path / "run", resume=True, console=QUIET)


def test_a_step_beyond_the_end_is_refused(digits: Path, tmp_path: Path) -> None:
    run(digits, tmp_path / "run", steps=2)
    file = tmp_path / "run" / "checkpoints" / "last" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "step": 3}))
    with pytest.raises(MapetError, match="checkpoints/last is damaged .step 3 of 2"):
        pretrain({}, tmp_path / "run", resume=True, console=QUIET)


def test_a_measurement_that_fails_loses_no_step(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "labelled" / "train")
    shutil.copytree(digits, tmp_path / "labelled" / "test")
    for file in (tmp_path / "labelled" / "test").rglob("*.png"):
        file.write_bytes(b"cut")
    with pytest.raises(MapetError, match="cannot be read"):
        run(digits, tmp_path / "run", steps=3, eval_data=str(tmp_path / "labelled"))
    assert json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())["step"] == 3
    assert pretrain({"eval_data": None}, tmp_path / "run", resume=True, console=QUIET).config.eval_data is None


def test_changed_images_are_refused_on_resume(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "images")
    run(tmp_path / "images", tmp_path / "run", steps=2)
    (tmp_path / "images").rename(tmp_path / "moved")
    values = {**TINY, "data": str(tmp_path / "moved"), "steps": 2}
    pretrain(values, tmp_path / "run", resume=True, console=QUIET)
    (tmp_path / "moved" / "class 3" / "1.png").unlink()
    with pytest.raises(MapetError, match="'data' changed.*it had 60 images, now there are 59"):
        pretrain(values, tmp_path / "run", resume=True, console=QUIET)


def test_another_tokenizer_is_refused_on_resume(digits: Path, tmp_path: Path) -> None:
    run(digits, tmp_path / "run", steps=2)
    run(digits, tmp_path / "other", steps=2, seed=1)
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    shutil.copytree(tmp_path / "other" / "tokenizer", tmp_path / "run" / "tokenizer")
    with pytest.raises(MapetError, match="the tokenizer or token store is not what the run in"):
        pretrain({}, tmp_path / "run", resume=True, console=QUIET)


def test_file_names_that_are_no_unicode(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(digits, tmp_path / "images")
    Path(os.fsdecode(os.fsencode(tmp_path / "images") + b"/caf\xe9.png")).write_bytes(b"cut")
    run(tmp_path / "images", tmp_path / "run", epochs=1, batch_size=61)
    assert r"skipped damaged image caf\udce9.png" in (tmp_path / "run" / "log.txt").read_text()
    assert "Logging error" not in capsys.readouterr().err


def test_damaged_images_are_logged_and_the_run_goes_on(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(digits, tmp_path / "images")
    (tmp_path / "images" / "class 5" / "2.png").write_bytes(b"cut")
    run(tmp_path / "images", tmp_path / "run", epochs=1, batch_size=20)
    assert lines(tmp_path / "run")[-1]["damaged"] == 1
    assert "skipped damaged image class 5/2.png" in (tmp_path / "run" / "log.txt").read_text()
    with pytest.raises(MapetError, match="1 of 60 images cannot be read.*--max-damaged"):
        run(tmp_path / "images", tmp_path / "strict", epochs=1, batch_size=20, max_damaged=0.01)
    assert not (tmp_path / "strict" / "config.yaml").exists()


def test_an_output_folder_among_the_images_is_refused(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "images")
    with pytest.raises(MapetError, match="lies inside the image folder"):
        run(tmp_path / "images", tmp_path / "images" / "run", steps=2)
    assert not (tmp_path / "images" / "run").exists()


def test_a_folder_called_as_a_tokenizer_is_does_not_take_its_place(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pixels").mkdir()
    monkeypatch.chdir(tmp_path)
    run(digits, tmp_path / "run", steps=1)
    with pytest.raises(MapetError, match="holds neither a tokenizer nor an exported backbone"):
        run(digits, tmp_path / "other", steps=1, tokenizer="./pixels")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a scaler")
def test_half_precision_needs_a_scaler(digits: Path, tmp_path: Path) -> None:
    said = subprocess.run(command(digits, tmp_path / "run", precision="fp16"), capture_output=True, text=True)
    assert said.returncode == 2
    assert "precision 'fp16' needs a GPU" in said.stderr
    assert not (tmp_path / "run").exists()


def test_a_fitted_tokenizer_is_taken_from_its_folder(digits: Path, tmp_path: Path) -> None:
    first = run(digits, tmp_path / "first", steps=2)
    run(digits, tmp_path / "again", steps=2, tokenizer=str(tmp_path / "first" / "tokenizer"))
    assert curve(tmp_path / "first") == curve(tmp_path / "again")
    with pytest.raises(MapetError, match=r"gives 4 x 4 ids an image, but the model has 7 x 7 patches"):
        run(digits, tmp_path / "other", steps=2, patch_size=4, tokenizer=str(tmp_path / "first" / "tokenizer"))
    with pytest.raises(MapetError, match=r"images have shape \(3, 28, 28\), but this tokenizer reads \(1, 28, 28\)"):
        run(digits, tmp_path / "other", steps=2, channels=3, tokenizer=str(tmp_path / "first" / "tokenizer"))
    with pytest.raises(MapetError, match="is fitted and has 16 ids; leave --vocab-size out"):
        run(digits, tmp_path / "other", steps=2, vocab_size=9, tokenizer=str(tmp_path / "first" / "tokenizer"))
    assert not (tmp_path / "other" / "config.yaml").exists()
    assert first.config.vocab_size == 16


def test_a_run_that_diverges_stops_with_its_cause(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match=r"step \d+: loss .*the gradients overflowed.*lower --lr"):
        run(
            digits,
            tmp_path / "run",
            steps=200,
            lr=1e3,
            weight_decay=1e3,
            clip_grad=1e30,
            warmup=0.0,
            checkpoint_every=1,
        )
    weights = load_file(tmp_path / "run" / "checkpoints" / "last" / "task.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))


def test_a_full_disk_is_one_sentence_and_loses_nothing(digits: Path, tmp_path: Path) -> None:
    """A limit on file sizes makes the same writes fail that a full disk does."""
    out = tmp_path / "run"
    arguments = command(digits, out, steps=4, checkpoint_every=2)
    failed = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=_small_files)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert f"cannot write to {out}: a file grew over the size limit" in " ".join(failed.stderr.split())
    assert not (out / "checkpoints" / "last").exists()
    assert subprocess.run([*arguments, "--resume"], capture_output=True).returncode == 0
    run(digits, tmp_path / "whole", steps=4, checkpoint_every=2)
    assert curve(out) == curve(tmp_path / "whole")


def test_two_processes_see_what_one_sees(digits: Path, tmp_path: Path) -> None:
    """Real processes under torchrun: the same images a step, so nearly the same curve, and one run folder."""
    options: dict[str, Any] = {"objective": "raster", "steps": 4, "drop_path": 0.0, "batch_size": 16}
    run(digits, tmp_path / "one", **options)
    arguments = command(digits, tmp_path / "two", **options)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([arguments[0], *launcher, *arguments[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "two" / "checkpoints" / "last" / "state.json").read_text())
    assert state["made_from"]["processes"] == 2
    assert done.stderr.count("done: ") == 1
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in two] == [0, 1, 2, 3]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_real_photographs_through_real_features(photographs: Path, mobilenet_weights: Path, tmp_path: Path) -> None:
    """20 ImageNet photographs at 224 px, ids of MobileNetV2's features: a ViT-Tiny/16 learns its small set."""
    pretrain(
        {
            "data": str(photographs),
            "model": "vit_tiny_patch16_224",
            "image_size": 224,
            "vocab_size": 32,
            "tokenizer": "mobilenet_v2",
            "teacher_stage": "features.13",
            "teacher_weights": str(mobilenet_weights),
            "batch_size": 4,
            "steps": 30,
            "lr": 1e-3,
            "crop_min": 1.0,
            "flip": 0.0,
            "color_jitter": 0.0,
            "drop_path": 0.0,
            "layer_scale": None,
            "warmup": 0.1,
            "beta2": 0.98,
        },
        tmp_path / "run",
        console=QUIET,
    )
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    unigram = json.loads((tmp_path / "run" / "baseline.json").read_text())["entropy"]
    assert losses[0] > unigram
    assert sum(losses[-4:]) / 4 < unigram


def test_the_log_says_what_is_run(digits: Path, tmp_path: Path) -> None:
    run(digits, tmp_path / "a", steps=1)
    run(digits, tmp_path / "b", steps=1)
    for name in ("a", "b"):
        text = (tmp_path / name / "log.txt").read_text()
        assert f"{tmp_path / name}: 60 images, steps 0 to 1 of 8 images" in text
    assert sum(isinstance(h, logging.FileHandler) for h in logging.getLogger("mapet").handlers) <= 1
