"""``mapet eval segment``: semantic segmentation by a head on frozen patch features."""

import json

from rich.console import Console

from mapet.config.verb import Call, Verb
from mapet.jobs.segment.config import SegmentConfig


def run(call: Call) -> int:
    """Train and measure the heads, and print the results."""
    from mapet.jobs.segment.results import segmentation_table
    from mapet.jobs.segment.run import segment

    result = segment(call.values, call.out, console=call.console)
    if call.flags.json:
        print(json.dumps(result))
    else:
        Console().print(segmentation_table(result).to_terminal())
    if call.out is not None:
        call.say(f"results and pictures: {call.out}")
    return 0


SEGMENT = Verb(
    summary="train a head on the patch features of a frozen model, and measure mIoU on images with masks",
    example="  mapet eval segment runs/photos ./scenes --out scenes-results",
    configs=(SegmentConfig,),
    run=run,
    positional={"model": None, "data": "a folder with images/ and masks/, or ADE20K's"},
    out="a new folder for results.json, results.md, head.safetensors and predictions.png",
    needs_out=False,
    json="print the results as JSON",
)
