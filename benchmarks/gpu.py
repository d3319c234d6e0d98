"""Measurements for a GPU: the slowest kernels of a step, memory by batch size, and a pre-training from JPEGs.

sh benchmarks/gpu.sh FOLDER       # the GPU tests, the step table and this, in at most 8 minutes on one large GPU
python benchmarks/gpu.py --tiny   # a proof on the CPU that it runs
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from loader import write_photographs
from run import DEVICE, batch_of, make, step_of, wait
from torch.profiler import ProfilerActivity, profile


def top_kernels(model: str, batch: int, compiled: bool) -> str:
    """Return the 15 kernels (on a CPU: operations) that take most of a step of MaPeT in bfloat16."""
    objective = make("mapet", model, 224).to(DEVICE)
    if compiled:
        objective.forward = torch.compile(objective.forward, dynamic=False)  # type: ignore[method-assign]
    step = step_of(objective, "bf16", *batch_of(batch, 224))
    for _ in range(3):
        step()
    wait()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])]
    with profile(activities=kinds) as found:
        for _ in range(3):
            step()
        wait()
    order = "self_cuda_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60))


def memory(model: str, batches: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the peak memory of a step by batch size, until it does not fit."""
    objective = make("mapet", model, 224).to(DEVICE)
    for batch in batches:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            step_of(objective, "bf16", *batch_of(batch, 224))()
        except torch.cuda.OutOfMemoryError:
            yield {"batch": batch, "peak_gib": None}
            return
        yield {"batch": batch, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


@contextmanager
def watched(file: Path) -> Iterator[None]:
    """Write utilisation (%) and power (W) each second, where nvidia-smi is there."""
    if shutil.which("nvidia-smi") is None:
        yield
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu,power.draw", "--format=csv,noheader,nounits", "-l", "1"]
    with file.open("w") as out, subprocess.Popen(query, stdout=out) as watcher:
        try:
            yield
        finally:
            watcher.terminate()


def pretraining(folder: Path, flags: list[str], images: int) -> dict[str, Any]:
    """Pre-train from JPEGs; return speed and the share of time that waits for data, without the first tenth."""
    (folder / "jpegs").mkdir()
    write_photographs(folder / "jpegs", images, 500, 375)
    command = [sys.executable, "-m", "mapet", "pretrain", str(folder / "jpegs"), "--out", str(folder / "run"), *flags]
    with watched(folder / "gpu.csv"):
        subprocess.run(command, check=True)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steady = records[len(records) // 10 :]
    found = {key: statistics.median(record[key] for record in steady) for key in ("images_per_s", "data_wait")}
    found |= {"steps": len(records), "first_loss": records[0]["loss"], "last_loss": records[-1]["loss"]}
    if (folder / "gpu.csv").exists():
        rows = [line.split(",") for line in (folder / "gpu.csv").read_text().splitlines()[10:]]
        names = ("utilisation_percent", "power_w")
        found |= {name: statistics.mean(float(row[i]) for row in rows) for i, name in enumerate(names) if rows}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--compile", action="store_true", help="also compiled steps")
    parser.add_argument("--steps", type=int, default=600, help="of the pre-training")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    large, small, batch = "vit_base_patch16_224", "vit_small_patch16_224", 256
    flags = ["--model", small, "--batch-size", "256", "--steps", str(arguments.steps), "--vocab-size", "1024"]
    if arguments.tiny:
        large, batch = "vit_tiny_patch16_224", 1
        flags = ["--model", large, "--model-args", "depth=1", "--batch-size", "4", "--steps", "2", "--vocab-size", "8"]
    found: dict[str, Any] = {"torch": torch.__version__, "device": "CPU"}
    if DEVICE.type == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["memory"] = list(memory(large, [64, 128, 256, 512, 1024]))
    for compiled in (False, True)[: 1 + arguments.compile]:
        print(table := top_kernels(large, batch, compiled), flush=True)
        found["kernels, compiled" if compiled else "kernels"] = table
    with tempfile.TemporaryDirectory() as folder:
        more = ["--compile"] if arguments.compile else []
        found["pretraining"] = pretraining(Path(folder), [*flags, *more], 8 if arguments.tiny else 2048)
    print(json.dumps({key: value for key, value in found.items() if "kernels" not in key}, indent=1))
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
