"""``mapet convert upstream FILE``: a checkpoint of MaPeT's authors becomes a folder for timm and every command."""

import json

from mapet.config.verb import Call, Verb
from mapet.jobs.convert.config import ConvertConfig


def run(call: Call) -> int:
    """Convert."""
    from mapet.jobs.convert.run import convert

    result = convert(call.values, call.out)
    if call.flags.json:
        print(json.dumps({"folder": call.out, **result}))
        return 0
    what = f"classifier of {result['classes']} classes" if result["classes"] else "network without a classifier"
    assumed = " (assumed: the file does not tell; if wrong, pass --num-heads)" if result["num_heads_assumed"] else ""
    call.say(
        f"{result['architecture']}, {what}, {result['image_size']} px, {result['num_heads']} attention heads{assumed}: "
        f'{call.out}\nuse it: timm.create_model("local-dir:{call.out}", pretrained=True)'
    )
    return 0


UPSTREAM = Verb(
    summary="turn a checkpoint of MaPeT's authors into a folder for timm and every command",
    about="Turn the network of a checkpoint of MaPeT's authors, a classifier or a pre-training checkpoint, into an\n"
    "exported folder. No code in the file is run, and a weight that does not fit is an error. Published weights of\n"
    "MAE, BEiT and BEiT v2 need no conversion: every command takes timm's names for them.",
    example="  mapet convert upstream mapet_base.tar --out models/mapet",
    configs=(ConvertConfig,),
    run=run,
    positional={"file": None},
    required=True,
    out="the folder, which is new",
    recipe=False,
    json="print the result as JSON",
)
