"""``mapet pretrain``: a folder of images in, a backbone out."""

from __future__ import annotations

import argparse
from typing import Any

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_job_flags, given_values
from mapet.jobs.pretrain.config import PretrainConfig


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "pretrain",
        help="pre-train a ViT on unlabelled images",
        description="Pre-train a ViT on a folder of unlabelled images, a text file of paths, or a demo set.",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out exactly, or begin it")
    data = "images; may also stand in the recipe, or in the run to be resumed"
    add_job_flags(parser, PretrainConfig, "the run folder", data)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Pre-train."""
    console = set_up_logging()
    from mapet.jobs.pretrain.run import pretrain

    result = pretrain(given_values(parsed, PretrainConfig), parsed.out, resume=parsed.resume, console=console)
    root = result.folder.root
    if not result.is_main:
        return 0
    if result.steps < result.total_steps:
        console.print(f"stopped and saved after step {result.steps}; --resume continues {root}", soft_wrap=True)
        return 128 + (result.stopped_by or 0)
    console.print(
        f'done: {root}\nuse it: timm.create_model("local-dir:{result.folder.exported}", pretrained=True)',
        soft_wrap=True,
    )
    return 0
