"""``mapet predict`` and ``mapet embed``: predicted classes and features of images, in a file."""

from __future__ import annotations

import argparse
import codecs
import sys
from typing import Any

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_job_flags, given_values
from mapet.jobs.infer.config import EmbedConfig, PredictConfig

DATA = "a folder of images, an image, a text file of paths, or a demo set"


def add_parser(verbs: Any) -> None:
    """Declare both verbs."""
    parser = verbs.add_parser(
        "predict",
        help="predict the classes of images with a fine-tuned model",
        description="Write the most probable classes of images and their probabilities, one row per image, in order.",
    )
    out = "a file ending in .csv, .jsonl or .parquet; default: CSV on standard output"
    add_job_flags(parser, PredictConfig, out, DATA, model=True, out_metavar="FILE", needs_out=False)
    parser.set_defaults(run=predict)
    parser = verbs.add_parser(
        "embed",
        help="write features of images to a Parquet file",
        description="Write features of images to a Parquet file, one row per image, in order. The memory does not "
        "grow with the number of images.",
    )
    add_job_flags(parser, EmbedConfig, "the file, ending in .parquet", DATA, model=True, out_metavar="FILE")
    parser.set_defaults(run=embed)


def predict(parsed: argparse.Namespace) -> int:
    """Predict the classes of images."""
    console = set_up_logging()
    from mapet.jobs.infer.run import predict_images

    # Names of files and classes may need Unicode, whatever the encoding of the terminal is.
    out: Any = codecs.getwriter("utf-8")(sys.stdout.buffer) if parsed.out is None else parsed.out
    result = predict_images(given_values(parsed, PredictConfig), out, console=console)
    console.print(f"{result.describe()}: {parsed.out or 'standard output'}", soft_wrap=True, markup=False)
    return 0


def embed(parsed: argparse.Namespace) -> int:
    """Write features of images."""
    console = set_up_logging()
    from mapet.jobs.infer.run import embed_images

    result = embed_images(given_values(parsed, EmbedConfig), parsed.out, console=console)
    console.print(f"{result.describe()}: {parsed.out}", soft_wrap=True, markup=False)
    return 0
