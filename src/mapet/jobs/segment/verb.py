"""``mapet eval segment``: semantic segmentation by a head on frozen patch features."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_job_flags, given_values
from mapet.jobs.segment.config import SegmentConfig

TASK = "train a head on the patch features of a frozen model, and measure mIoU and pixel accuracy on images with masks"
DATA = "a folder with images/ and masks/, or ADE20K's; may also stand in the recipe"
OUT = "a new folder for results.json, results.md, head.safetensors and predictions.png"


def add_parser(kinds: Any) -> None:
    """Declare ``mapet eval segment``."""
    parser = kinds.add_parser("segment", help=TASK, description=f"{TASK[0].upper()}{TASK[1:]}.")
    add_job_flags(parser, SegmentConfig, OUT, DATA, model=True, needs_out=False)
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Train and measure the heads, and print the results."""
    console = set_up_logging()
    from mapet.jobs.segment.report import segmentation_table
    from mapet.jobs.segment.run import evaluate_segmentation

    result = evaluate_segmentation(given_values(parsed, SegmentConfig), parsed.out, console=console)
    if parsed.json:
        print(json.dumps(result))
    else:
        Console().print(segmentation_table(result).to_terminal())
    if parsed.out is not None:
        console.print(f"results and pictures: {parsed.out}", soft_wrap=True)
    return 0
