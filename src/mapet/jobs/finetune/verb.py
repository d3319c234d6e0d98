"""``mapet finetune``: a model and labelled images in, a classifier out."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_job_flags, given_values
from mapet.jobs.finetune.config import FinetuneConfig


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "finetune",
        help="train a classifier from a pre-trained model and labelled images",
        description="Fine-tune a run, an exported folder or a timm model on labelled images: one subfolder per class. "
        "The defaults are the recipe of the method's authors for ViT-Base; see also the recipes finetune_tiny, "
        "finetune_small and finetune_base.",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out exactly, or begin it")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_job_flags(parser, FinetuneConfig, "the run folder", "labelled images; may also stand in the recipe", model=True)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Fine-tune."""
    console = set_up_logging()
    from mapet.jobs.finetune.run import finetune

    result = finetune(given_values(parsed, FinetuneConfig), parsed.out, resume=parsed.resume, console=console)
    root = result.folder.root
    if not result.is_main:
        return 0
    if result.scores is None:
        console.print(f"stopped and saved after step {result.steps}; --resume continues {root}", soft_wrap=True)
        return 128 + (result.stopped_by or 0)
    if parsed.json:
        print(json.dumps({**json.loads(result.folder.results.read_text()), "exported": str(result.folder.exported)}))
    console.print(
        f"done: accuracy {result.scores.accuracy:.2%} on the test images, {result.folder.results}\n"
        f"use it: mapet predict {root} IMAGES",
        soft_wrap=True,
    )
    return 0
