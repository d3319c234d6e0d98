"""``mapet demo``: pre-train on digits that come with the package's dependencies and show the gain."""

import argparse
from pathlib import Path

from rich.console import Console

from mapet.config.verb import Call, Verb
from mapet.data.names import DEMO_NAMES
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.report.tables import Table, percent

DEFAULT_OUT = "runs/demo"
# Rows and columns of the table.
NAMES = {"raw_pixels": "raw pixels", "random_vit": "random-init ViT", "pretrained_vit": "pre-trained ViT"}
NAMES |= {"knn": "k-NN", "linear": "linear probe"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flag that only this command has."""
    parser.add_argument("--dataset", default="mnist", choices=DEMO_NAMES, help="images to use (default: mnist)")


def run(call: Call) -> int:
    """Run the demo."""
    from mapet.jobs.demo.run import run_demo

    flags, out = call.flags, Path(call.out or DEFAULT_OUT)
    result, rows = run_demo({**call.values, "data": flags.dataset}, out, resume=flags.resume, console=call.console)
    if rows is None:
        return call.unfinished(result) or 0
    columns = list(rows["pretrained_vit"])
    header = [NAMES.get(column, f"{column.removeprefix('finetune_')} labels") for column in columns]
    lines = [[NAMES[name], *(percent(row.get(column)) for column in columns)] for name, row in rows.items()]
    Console().print(Table(["", *header], lines, f"accuracy on {flags.dataset}, test images").to_terminal())
    call.say(
        f"pictures: {result.folder.figures}\nresults:  {result.folder.results}\n"
        f'backbone: timm.create_model("local-dir:{result.exported}", pretrained=True)'
    )
    return 0


DEMO = Verb(
    summary="pre-train on digits that come with a dependency and show the gain, offline, in under 3 minutes on 2 cores",
    about="Pre-train a small ViT on 4,000 digits and compare it with the untrained one on 1,000 others.",
    configs=(PretrainConfig,),
    run=run,
    out="the run folder (default: runs/demo)",
    needs_out=False,
    recipe="demo",
    resume="continue an interrupted demo in --out",
    left_out=("data",),
    options=add_options,
)
