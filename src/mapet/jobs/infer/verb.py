"""``mapet predict`` and ``mapet embed``: predicted classes and features of images, in a file."""

import codecs
import sys
from typing import Any

from mapet.config.verb import Call, Verb
from mapet.data.names import check_images
from mapet.jobs.infer.config import EmbedConfig, PredictConfig

POSITIONAL = {
    "model": None,
    "data": "a folder of images, an image, a text file of paths, or another source, see docs/data.md",
}


def predict(call: Call) -> int:
    """Predict the classes of images."""
    from mapet.jobs.infer.run import predict_images

    # Names of files and classes may need Unicode, whatever the encoding of the terminal is.
    out: Any = codecs.getwriter("utf-8")(sys.stdout.buffer) if call.out is None else call.out
    result = predict_images(call.values, out, console=call.console)
    call.say(f"{result.describe()}: {call.out or 'standard output'}")
    return 0


def embed(call: Call) -> int:
    """Write features of images."""
    from mapet.jobs.infer.run import embed_images

    result = embed_images(call.values, call.out, console=call.console)
    call.say(f"{result.describe()}: {call.out}")
    return 0


PREDICT = Verb(
    summary="predict the classes of images with a fine-tuned model",
    about="Write the most probable classes of images and their probabilities, one row per image, in order.",
    example="  mapet predict runs/classifier ./new --out predictions.csv",
    configs=(PredictConfig,),
    run=predict,
    positional=POSITIONAL,
    out="a file ending in .csv, .jsonl or .parquet; default: CSV on standard output",
    out_metavar="FILE",
    needs_out=False,
    check_data=check_images,
)
EMBED = Verb(
    summary="write features of images to a Parquet file",
    about="Write features of images to a Parquet file, one row per image, in order.",
    example="  mapet embed runs/photos ./photos --out features.parquet",
    configs=(EmbedConfig,),
    run=embed,
    positional=POSITIONAL,
    out="the file, ending in .parquet",
    out_metavar="FILE",
    check_data=check_images,
)
