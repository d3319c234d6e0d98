"""``mapet demo``: pre-train on embedded digits and show what it was good for."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_config_flags, add_out_flag, given_values
from mapet.jobs.pretrain.config import PretrainConfig

DEFAULT_OUT = Path("runs/demo")
ROW_NAMES = {"raw_pixels": "raw pixels", "random_vit": "random-init ViT", "pretrained_vit": "pre-trained ViT"}


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "demo",
        help="pre-train on embedded digits and show the gain, offline, in under 3 minutes on 2 cores",
        description="Pre-train a small ViT on 4,000 digits and compare it with the untrained one on 1,000 others.",
    )
    parser.add_argument(
        "--dataset", default="mnist", choices=("mnist", "fashion-mnist"), help="images to use (default: mnist)"
    )
    add_out_flag(parser, "the run folder (default: runs/demo, or the next free)", required=False)
    parser.add_argument("--config", default="demo", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help="continue an interrupted demo in --out")
    add_config_flags(parser, PretrainConfig)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the demo."""
    console = set_up_logging()
    from mapet.jobs.demo.run import run_demo

    out = Path(parsed.out) if parsed.out else DEFAULT_OUT if parsed.resume else _next_free(DEFAULT_OUT)
    values = given_values(parsed, PretrainConfig) | {"data": parsed.dataset}
    result, rows = run_demo(values, out, resume=parsed.resume, console=console)
    if not result.is_main:
        return 0
    if rows is None:
        console.print(f"stopped and saved after step {result.steps}; --resume continues {out}", soft_wrap=True)
        return 128 + (result.stopped_by or signal.SIGINT)  # else a fine-tuning was stopped
    print_rows(Console(), rows, f"accuracy on {parsed.dataset}, test images")
    console.print(
        f"pictures: {result.folder.figures}\nresults:  {out / 'results.json'}\n"
        f'backbone: timm.create_model("local-dir:{result.folder.exported}", pretrained=True)',
        soft_wrap=True,
    )
    return 0


def _next_free(folder: Path) -> Path:
    candidate, number = folder, 2
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate


def print_rows(console: Console, rows: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Print accuracies in 0..1 as a table of percentages."""
    columns = list(rows["pretrained_vit"])
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        name, _, count = column.partition("_")
        table.add_column(
            f"{count} labels" if count else {"knn": "k-NN", "linear": "linear probe"}[name], justify="right"
        )
    for key, row in rows.items():
        cells = [f"{100 * row[column]:.1f} %" if column in row else "-" for column in columns]
        table.add_row(ROW_NAMES.get(key, key), *cells, style="bold" if key == "pretrained_vit" else "")
    console.print(table)
