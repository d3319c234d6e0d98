"""``mapet predict``: the classes of images, in a table."""

from __future__ import annotations

import argparse
import codecs
import sys
from typing import Any

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_job_flags, given_values
from mapet.jobs.infer.config import PredictConfig


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "predict",
        help="name the classes of images, by a fine-tuned model",
        description="Name the classes of images and their probabilities, a row an image, in order.",
    )
    data = "a folder of images, an image, a text file of paths, or a demo set"
    out = "a file ending in .csv, .jsonl or .parquet; left out, CSV is written to standard output"
    add_job_flags(parser, PredictConfig, out, data, model=True, out_metavar="FILE", needs_out=False)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Predict."""
    console = set_up_logging()
    from mapet.jobs.infer.run import predict_images

    # File names may need Unicode, whatever the terminal speaks.
    out: Any = codecs.getwriter("utf-8")(sys.stdout.buffer) if parsed.out is None else parsed.out
    result = predict_images(given_values(parsed, PredictConfig), out, console=console)
    console.print(f"{result.describe()}: {parsed.out or 'standard output'}", soft_wrap=True, markup=False)
    return 0
