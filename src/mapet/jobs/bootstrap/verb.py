"""``mapet bootstrap``: pre-train on pixels, then on one's own features, round after round."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_job_flags, given_values
from mapet.jobs.pretrain.config import PretrainConfig


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "bootstrap",
        help="pre-train in rounds, each on ids of the features that the last one learned",
        description="Pre-train on k-pixels, fit a tokenizer to the features so learned, pre-train anew on its ids, "
        "and so on: targets that get better without a foreign teacher.",
    )
    parser.add_argument("--rounds", type=int, default=1, help="rounds after the first (default: 1)")
    parser.add_argument(
        "--block", type=int, default=-1, help="of the network whose features are clustered (default: -1, the last)"
    )
    parser.add_argument("--resume", action="store_true", help="continue where it was stopped, or begin")
    parser.add_argument("--json", action="store_true", help="print the rounds as JSON")
    add_job_flags(parser, PretrainConfig, "the rounds' run folders are made in it")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Bootstrap."""
    console = set_up_logging()
    from mapet.jobs.bootstrap.run import bootstrap

    results = bootstrap(
        given_values(parsed, PretrainConfig),
        parsed.out,
        rounds=parsed.rounds,
        block=parsed.block,
        resume=parsed.resume,
        console=console,
    )
    last = results[-1]
    if not last.is_main:
        return 0
    if parsed.json:
        rounds = [{"folder": str(r.folder.root), "tokenizer": r.config.tokenizer, "steps": r.steps} for r in results]
        print(json.dumps({"rounds": rounds, "exported": str(last.folder.exported)}))
    if last.steps < last.total_steps:
        console.print(f"stopped and saved after step {last.steps} of {last.folder.root}; --resume continues")
        return 128 + (last.stopped_by or 0)
    console.print(
        f'done: timm.create_model("local-dir:{last.folder.exported}", pretrained=True) is the last round\'s',
        soft_wrap=True,
    )
    return 0
