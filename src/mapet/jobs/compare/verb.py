"""``mapet compare``: several objectives and tokenizers in one setting, and what each is worth."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_config_flags, add_out_flag, given_values
from mapet.cli.stopping import Stopped
from mapet.jobs.compare.config import CompareConfig
from mapet.jobs.pretrain.config import PretrainConfig

# What is said of pre-training by the comparison, or makes no sense for several.
LEFT_OUT = ("data", "eval_data", "eval_every", "init", "init_parts", "objective", "seed", "tokenizer", "tokens")


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "compare",
        help="pre-train with several objectives and tokenizers, and measure what each is worth",
        description="Pre-train with several objectives and tokenizers: the same network, images in the same order, "
        "optimiser and budget; measure each; and write tables (Markdown, CSV), a picture and a page. What is not said "
        "here is said as for pretrain, or by its recipe, and holds for all.",
    )
    parser.add_argument("data", nargs="?", help=CompareConfig.model_fields["data"].description)
    add_out_flag(parser, "the comparison's folder, each run below it")
    parser.add_argument("--config", metavar="RECIPE", help="a YAML recipe: a file, or one of the package's by name")
    going_on = parser.add_mutually_exclusive_group()
    going_on.add_argument(
        "--resume", action="store_true", help="continue the comparison in --out, or extend it, or begin it"
    )
    going_on.add_argument(
        "--join", action="store_true", help="work on the comparison in --out beside the process that began it"
    )
    add_config_flags(parser, CompareConfig)
    add_config_flags(parser, PretrainConfig, LEFT_OUT, "pre-training, ")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Compare."""
    console = set_up_logging()
    from mapet.jobs.compare.report import comparison_tables
    from mapet.jobs.compare.run import compare, join_comparison

    values = given_values(parsed, CompareConfig, PretrainConfig)
    try:
        if parsed.join:
            comparison = join_comparison(values, parsed.out)
        else:
            comparison = compare(values, parsed.out, resume=parsed.resume)
    except (KeyboardInterrupt, Stopped):
        console.print(f"what is done is saved: --resume continues {parsed.out}", soft_wrap=True)
        raise
    for table in comparison_tables(comparison):
        Console().print(table)
    for remark in comparison.remarks:
        console.print(remark, soft_wrap=True)
    console.print(f"tables and picture: {parsed.out}/report.html, results.md, results.csv", soft_wrap=True)
    return 1 if comparison.failures else 0
