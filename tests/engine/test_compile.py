"""``--compile``: the same losses, and a warning where there is no compiler."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import TINY, curve, mapet_command, pretrain_tiny, records


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("objective", ["mapet", "mae"])
def test_a_compiled_run_has_the_same_losses(objective: str, digits: Path, tmp_path: Path) -> None:
    """Also with stochastic depth, which is drawn outside of the compiled step."""
    options = {"objective": objective, "steps": 12, "drop_path": 0.2, "precision": "no", "color_jitter": 0.0}
    if objective == "mae":
        options["vocab_size"] = None
    plain = pretrain_tiny(digits, tmp_path / "plain", **options)
    compiled = pretrain_tiny(digits, tmp_path / "compiled", **options, compile=True)
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("plain", "compiled")]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    images = torch.randn(2, 1, 28, 28)
    outputs = [result.task.outcome().eval()(images) for result in (plain, compiled)]
    assert torch.allclose(*outputs, atol=1e-2)


@pytest.mark.slow
def test_the_measurements_for_a_gpu_run_on_a_cpu(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    subprocess.run([sys.executable, script, "--tiny", "--json", tmp_path / "gpu.json"], check=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["pretraining"]["steps"] == 2
    assert "aten::" in found["kernels"]


def test_without_a_compiler_the_step_is_not_compiled(digits: Path, tmp_path: Path) -> None:
    values = {**TINY, "data": str(digits), "steps": 2}
    environment = {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        mapet_command("pretrain", {**values, "compile": True}, tmp_path / "run"),
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: the step is not compiled: ") == 1
    pretrain_tiny(digits, tmp_path / "plain", steps=2)
    assert curve(tmp_path / "run") == curve(tmp_path / "plain")
