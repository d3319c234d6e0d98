"""``mapet pretrain``: a folder of images in, a backbone out."""

from mapet.config.verb import Call, Verb
from mapet.data.names import check_images
from mapet.jobs.pretrain.config import PretrainConfig


def run(call: Call) -> int:
    """Pre-train."""
    from mapet.jobs.pretrain.run import pretrain

    result = pretrain(call.values, call.out, resume=call.flags.resume, console=call.console)
    if (status := call.unfinished(result)) is not None:
        return status
    call.say(f'done: {call.out}\nuse it: timm.create_model("local-dir:{result.exported}", pretrained=True)')
    return 0


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
)
