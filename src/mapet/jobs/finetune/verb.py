"""``mapet finetune``: a model and labelled images in, a classifier out."""

import json

from mapet.config.verb import Call, Verb
from mapet.data.names import check_labelled
from mapet.jobs.finetune.config import FinetuneConfig


def run(call: Call) -> int:
    """Fine-tune."""
    from mapet.jobs.finetune.run import finetune

    result = finetune(call.values, call.out, resume=call.flags.resume, console=call.console)
    if (status := call.unfinished(result)) is not None:
        return status
    if call.flags.json:
        print(json.dumps({**result.measured, "exported": str(result.exported)}))
    call.say(
        f"done: accuracy {result.measured['accuracy']:.2%} on the test images, {result.folder.results}\n"
        f"use it: mapet predict {call.out} IMAGES"
    )
    return 0


FINETUNE = Verb(
    summary="train a classifier from a pre-trained model and labelled images",
    about="Fine-tune a run, an exported folder or a timm model on labelled images: one subfolder per class. The\n"
    "defaults are the recipe of the method's authors for ViT-Base; see also the recipes finetune_tiny,\n"
    "finetune_small and finetune_base.",
    example="  mapet finetune runs/photos ./labelled --out runs/classifier",
    configs=(FinetuneConfig,),
    run=run,
    positional={"model": None, "data": "labelled images; may also stand in the recipe"},
    out="the run folder",
    resume="continue the run in --out exactly, or begin it",
    json="print the result as JSON",
    check_data=check_labelled,
)
