"""``mapet embed``: features of images, in a Parquet file."""

from __future__ import annotations

import argparse
from typing import Any

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_job_flags, given_values
from mapet.jobs.infer.config import EmbedConfig


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "embed",
        help="write features of images to a Parquet file",
        description="Write features of images to a Parquet file, a row an image, in order. Memory does not grow with "
        "the number of images.",
    )
    data = "a folder of images, an image, a text file of paths, or a demo set"
    add_job_flags(parser, EmbedConfig, "the file, ending in .parquet", data, model=True, out_metavar="FILE")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Embed."""
    console = set_up_logging()
    from mapet.jobs.infer.run import embed_images

    result = embed_images(given_values(parsed, EmbedConfig), parsed.out, console=console)
    console.print(f"{result.describe()}: {parsed.out}", soft_wrap=True, markup=False)
    return 0
