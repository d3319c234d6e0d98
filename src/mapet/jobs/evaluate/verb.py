"""``mapet eval KIND MODEL DATA``: measure a model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_job_flags, given_values
from mapet.jobs.evaluate.config import EVALUATIONS
from mapet.jobs.segment import verb as segment

DATA = "labelled images: a folder with one subfolder per class, perhaps below train and test (or val), or a demo set"
OUT = "a new folder for results.json, results.md and confusion.csv"


def add_parser(verbs: Any) -> None:
    """Declare ``mapet eval`` and its kinds."""
    parser = verbs.add_parser(
        "eval",
        help="measure a model: k-NN, linear and attentive probe, its classifier, segmentation",
        description="Measure a run, an exported model or any timm model on labelled images, or images with masks.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, (config_class, text) in EVALUATIONS.items():
        kind = kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        kind.add_argument("--json", action="store_true", help="print the results as JSON")
        add_job_flags(kind, config_class, OUT, DATA, model=True, needs_out=False)
        kind.set_defaults(run=run)
    segment.add_parser(kinds)


def run(parsed: argparse.Namespace) -> int:
    """Evaluate a model and print the results."""
    console = set_up_logging()
    from mapet.jobs.evaluate.results import MOST_CLASSES_SHOWN, class_table, summary_table
    from mapet.jobs.evaluate.run import evaluate

    results = evaluate(parsed.kind, given_values(parsed, EVALUATIONS[parsed.kind][0]), parsed.out, console=console)
    if parsed.json:
        print(json.dumps(results))
    else:
        Console().print(summary_table(results).to_terminal(), class_table(results, MOST_CLASSES_SHOWN).to_terminal())
        if parsed.out:
            console.print(f"results: {parsed.out}", soft_wrap=True)
    return 0
