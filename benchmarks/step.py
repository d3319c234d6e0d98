"""Time one training step (drawing the mask, forward, backward) of every objective on the same backbone.

    python benchmarks/step.py --model vit_tiny_patch16_224 --batch-size 8 --precision no

Each round times every objective once, so that a change in the machine's speed affects all of them. Ratios to `mim` are
taken within each round.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time

import torch

from mapet.models.networks import build_vit
from mapet.objectives.base import Objective
from mapet.objectives.registry import OBJECTIVES, build_objective, build_target

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--precision", choices=PRECISIONS, default="no")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size, device=device)
    objectives = {}
    for name in arguments.objectives:
        backbone = build_vit(arguments.model, image_size=arguments.image_size)
        targets = OBJECTIVES[name].default_targets
        target = build_target(name, targets, backbone, arguments.vocab_size, "cosine")
        objectives[name] = build_objective(name, backbone, target).to(device)
    patches = next(iter(objectives.values())).patches
    ids = torch.randint(0, arguments.vocab_size, (arguments.batch_size, patches), device=device)

    def seconds(objective: Objective) -> float:
        began = time.perf_counter()
        dtype = PRECISIONS[arguments.precision]
        with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
            loss = objective(images, ids)["loss"]
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        objective.zero_grad()
        return time.perf_counter() - began

    times: dict[str, list[float]] = {name: [] for name in objectives}
    for round_number in range(arguments.rounds + 1):
        for name, objective in objectives.items():
            taken = seconds(objective)
            if round_number:  # the first round warms up
                times[name].append(taken)

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{arguments.model} at {arguments.image_size} px, batch {arguments.batch_size}, precision "
        f"{arguments.precision}, {where}, torch {torch.__version__}"
    )
    print(f"{'objective':10} {'median ms':>10} {'min':>8} {'max':>8} {'images/s':>9} {'ratio to mim':>13}")
    for name, taken in times.items():
        median = statistics.median(taken)
        ratio = ""
        if "mim" in times:
            ratio = f"{statistics.median(a / b for a, b in zip(taken, times['mim'], strict=True)):.2f}"
        print(
            f"{name:10} {1e3 * median:10.1f} {1e3 * min(taken):8.1f} {1e3 * max(taken):8.1f} "
            f"{arguments.batch_size / median:9.1f} {ratio:>13}"
        )


if __name__ == "__main__":
    main()
