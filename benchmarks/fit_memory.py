"""Measure the peak memory of fitting a codebook, by the size of its sample.

    python benchmarks/fit_memory.py --data IMAGES --teacher TEACHER --patches 200000 2000000

`mapet tokenizer fit` runs in its own process for each size. The peak is the resident set that the system reports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def peak(arguments: argparse.Namespace, patches: int) -> dict[str, float]:
    """Fit a codebook; return the size of the sample and the peak of the process in GiB."""
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
        tensors = Path(folder) / "tok" / "tokenizer.safetensors"
        header = tensors.read_bytes()
        size = int.from_bytes(header[:8], "little")
        width = json.loads(header[8 : 8 + size])["centroids"]["shape"][1]
    return {"sample": patches * width * 4 / 2**30, "peak": usage.ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", default="pixels")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--patches", type=int, nargs="+", default=[200_000, 2_000_000])
    parser.add_argument("more", nargs="*", help="further flags of mapet tokenizer fit, after --")
    arguments = parser.parse_args()
    for patches in arguments.patches:
        found = peak(arguments, patches)
        rest = found["peak"] - found["sample"]
        print(f"{patches} patches: peak {found['peak']:.2f} GiB, sample {found['sample']:.2f} GiB, rest {rest:.2f} GiB")


if __name__ == "__main__":
    main()
