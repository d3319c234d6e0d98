"""``mapet compare``: objectives and tokenizers in one setting; ``mapet table``: any runs side by side."""

import argparse
from pathlib import Path

from rich.console import Console

from mapet.config.base import marked
from mapet.config.verb import Call, Verb
from mapet.jobs.compare.config import CompareConfig
from mapet.jobs.pretrain.config import PretrainConfig


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a comparison alone."""
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--resume", action="store_true", help="continue the comparison in --out, or extend or begin it")
    ways.add_argument("--join", action="store_true", help="work on the comparison in --out beside other processes")


def run_compare(call: Call) -> int:
    """Compare; the exit status is 1 if a cell failed."""
    from mapet.jobs.compare.run import compare, join_comparison

    try:
        if call.flags.join:
            comparison = join_comparison(call.values, call.out)
        else:
            comparison = compare(call.values, call.out, resume=call.flags.resume)
    except BaseException as error:
        if not isinstance(error, Exception):  # Ctrl-C or another signal
            call.say(f"what is done is saved: --resume continues {call.out}")
        raise
    Console().print(*(table.to_terminal() for table in comparison.tables()))
    for remark in comparison.remarks():
        call.say(remark)
    call.say(f"tables and picture: {call.out}/report.html, results.md, results.csv")
    return 1 if comparison.failures else 0


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a table."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--csv", action="store_true", help="print comma-separated values")


def run_table(call: Call) -> int:
    """Tabulate runs."""
    from mapet.jobs.compare.table import tabulate_runs

    table = tabulate_runs(call.flags.runs)
    if call.out:
        Path(call.out).mkdir(parents=True, exist_ok=True)
        (Path(call.out) / "runs.md").write_text(table.to_markdown())
        (Path(call.out) / "runs.csv").write_text(table.to_csv())
    if call.flags.csv:
        print(table.to_csv(), end="")
    else:
        Console().print(table.to_terminal())
    return 0


COMPARE = Verb(
    summary="pre-train with several objectives and tokenizers, and measure the networks",
    about="Pre-train with several objectives and tokenizers: the same network, images in the same order, optimiser and "
    "budget. Measure each network, and write tables, a picture and a page. The flags of pretrain hold for every run.",
    configs=(CompareConfig, PretrainConfig),
    run=run_compare,
    positional={"data": None},
    out="the comparison's folder; the runs are below it",
    left_out=marked(PretrainConfig, "single"),
    options=add_compare_options,
)
TABLE = Verb(
    summary="tabulate run folders: objectives, lengths, losses, results, and the keys in which they differ",
    example="  mapet table runs/a runs/b",
    configs=(),
    run=run_table,
    out="a folder for runs.md and runs.csv",
    needs_out=False,
    recipe=False,
    options=add_table_options,
)
