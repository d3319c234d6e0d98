"""``mapet bootstrap``: pre-train on pixels, then on the network's own features, round after round."""

import argparse
import json

from mapet.config.verb import Call, Verb
from mapet.data.names import check_images
from mapet.jobs.pretrain.config import PretrainConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only this command has."""
    parser.add_argument("--rounds", type=int, default=1, help="rounds after the first (default: 1)")
    block_help = "block whose features are clustered (default: -1, the last)"
    parser.add_argument("--block", type=int, default=-1, help=block_help)


def run(call: Call) -> int:
    """Bootstrap."""
    from mapet.jobs.bootstrap.run import bootstrap

    flags = call.flags
    options = {"rounds": flags.rounds, "block": flags.block, "resume": flags.resume}
    results = bootstrap(call.values, call.out, **options, console=call.console)
    last = results[-1]
    if not last.is_main:
        return 0
    if flags.json:
        rounds = [{"folder": str(r.folder.root), "tokenizer": r.config.tokenizer, "steps": r.steps} for r in results]
        print(json.dumps({"rounds": rounds, "exported": str(last.exported)}))
    if not last.finished:
        call.say(f"stopped and saved after step {last.steps} of {last.folder.root}; --resume continues")
        return 128 + (last.stopped_by or 0)
    call.say(f'done: timm.create_model("local-dir:{last.exported}", pretrained=True) is the network of the last round')
    return 0


BOOTSTRAP = Verb(
    summary="pre-train in rounds, each on ids of the features that the previous round learned",
    about="Pre-train on k-pixels. Fit a tokenizer to the features that this gave, and pre-train anew on its ids.\n"
    "Repeat. Targets get better without a foreign teacher.",
    example="  mapet bootstrap ./photos --out runs/boot --rounds 2",
    configs=(PretrainConfig,),
    run=run,
    positional={"data": "images; may also stand in the recipe"},
    out="a folder; the rounds' run folders are made in it",
    resume="continue an interrupted bootstrap exactly, or begin it",
    json="print the rounds as JSON",
    check_data=check_images,
    options=add_options,
)
