"""Peak memory of fitting a codebook against the size of its sample.

    python benchmarks/fit_memory.py --data IMAGES --teacher TEACHER --patches 200000 2000000

Each size is fitted by `mapet tokenizer fit` in a process of its own, whose peak resident set the system reports.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open


def peak(arguments: argparse.Namespace, patches: int) -> dict[str, float]:
    """Fit a tokenizer; return the GiB of its sample and the peak GiB of the process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "mapet",
            "tokenizer",
            "fit",
            arguments.data,
            "--out",
            str(Path(folder) / "tok"),
            "--teacher",
            arguments.teacher,
            "--image-size",
            str(arguments.image_size),
            "--patch-size",
            str(arguments.patch_size),
            "--vocab-size",
            str(arguments.vocab_size),
            "--points-per-centroid",
            str(-(-patches // arguments.vocab_size)),
            "--kmeans-iterations",
            "2",
            "--workers",
            "0",
            "--json",
            *arguments.more,
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit("fitting failed")
        with safe_open(Path(folder) / "tok" / "tokenizer.safetensors", "pt") as file:
            width = file.get_slice("centroids").get_shape()[1]
    return {"sample": patches * width * 4 / 2**30, "peak": usage.ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", default="pixels")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--patches", type=int, nargs="+", default=[200_000, 2_000_000])
    parser.add_argument("more", nargs="*", help="further flags of the command, after --")
    arguments = parser.parse_args()
    for patches in arguments.patches:
        found = peak(arguments, patches)
        rest = found["peak"] - found["sample"]
        print(f"{patches} patches: peak {found['peak']:.2f} GiB, sample {found['sample']:.2f} GiB, rest {rest:.2f} GiB")


if __name__ == "__main__":
    main()
