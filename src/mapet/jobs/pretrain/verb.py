"""``mapet pretrain``: a folder of images in, a backbone out."""

import argparse

from mapet.config.verb import Call, Verb
from mapet.data.names import check_images
from mapet.errors import MapetError
from mapet.jobs.pretrain.config import PretrainConfig


def run(call: Call) -> int:
    """Pre-train."""
    from mapet.jobs.pretrain.run import pretrain

    flags = call.flags
    if flags.from_step is not None and flags.branch_of is None:
        raise MapetError("--from-step is given, but no run to branch off; name it with --branch-of RUN")
    branch = {"branch_of": flags.branch_of, "from_step": flags.from_step}
    result = pretrain(call.values, call.out, resume=flags.resume, console=call.console, **branch)
    if (status := call.unfinished(result)) is not None:
        return status
    call.say(f'done: {call.out}\nuse it: timm.create_model("local-dir:{result.exported}", pretrained=True)')
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what begins a run with a checkpoint of another one."""
    text = "begin with a checkpoint of another run, from whose configuration --lr and the like may differ"
    parser.add_argument("--branch-of", metavar="RUN", help=text)
    text = "the step of that checkpoint; default: the newest that was kept before the loss rose"
    parser.add_argument("--from-step", type=int, metavar="N", help=text)


PRETRAIN = Verb(
    summary="pre-train a ViT on unlabelled images",
    about="Pre-train a ViT on unlabelled images: a folder of them or of tar files, a text file of paths, s3://BUCKET/PREFIX,\n"
    "a Hugging Face data set hf:NAME, or a demo set.",
    example="  mapet pretrain ./photos --out runs/photos\n  mapet pretrain ./photos --out runs/photos --resume",
    configs=(PretrainConfig,),
    run=run,
    positional={"data": "images; may also stand in the recipe, or in the run to be resumed"},
    out="the run folder",
    resume="continue the run in --out exactly, or begin it",
    check_data=check_images,
    options=add_options,
)
