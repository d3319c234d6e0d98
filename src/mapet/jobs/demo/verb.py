"""``mapet demo``: pre-train on embedded digits and show the gain."""

import argparse
import signal
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from mapet.config.verb import Call, Verb
from mapet.data.names import DEMO_NAMES
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.report.tables import Table, percent

DEFAULT_OUT = Path("runs/demo")
ROW_NAMES = {"raw_pixels": "raw pixels", "random_vit": "random-init ViT", "pretrained_vit": "pre-trained ViT"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flag that only this command has."""
    parser.add_argument("--dataset", default="mnist", choices=DEMO_NAMES, help="images to use (default: mnist)")


def run(call: Call) -> int:
    """Run the demo."""
    from mapet.jobs.demo.run import run_demo

    flags = call.flags
    out = Path(call.out) if call.out else DEFAULT_OUT if flags.resume else _next_free(DEFAULT_OUT)
    result, rows = run_demo({**call.values, "data": flags.dataset}, out, resume=flags.resume, console=call.console)
    if not result.is_main:
        return 0
    if rows is None:
        call.say(f"stopped and saved after step {result.steps}; --resume continues {out}")
        return 128 + (result.stopped_by or signal.SIGINT)  # without stopped_by, a fine-tuning was stopped
    print_rows(Console(), rows, f"accuracy on {flags.dataset}, test images")
    call.say(
        f"pictures: {result.folder.figures}\nresults:  {result.folder.results}\n"
        f'backbone: timm.create_model("local-dir:{result.exported}", pretrained=True)'
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
    names = {"knn": "k-NN", "linear": "linear probe"}
    header = [names.get(column, f"{column.removeprefix('finetune_')} labels") for column in columns]
    lines = [[ROW_NAMES[name], *(percent(row.get(column)) for column in columns)] for name, row in rows.items()]
    console.print(Table(["", *header], lines, title, bold=[len(lines) - 1]).to_terminal())


DEMO = Verb(
    summary="pre-train on embedded digits and show the gain, offline, in under 3 minutes on 2 cores",
    about="Pre-train a small ViT on 4,000 digits and compare it with the untrained one on 1,000 others.",
    configs=(PretrainConfig,),
    run=run,
    out="the run folder (default: runs/demo, or the next free)",
    needs_out=False,
    recipe="demo",
    resume="continue an interrupted demo in --out",
    left_out=("data",),
    options=add_options,
)
