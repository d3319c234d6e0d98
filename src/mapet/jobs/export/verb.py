"""``mapet export FORMAT``: a trained model as a file or folder that others can use."""

import json
from functools import partial

from mapet.config.verb import Call, Verb
from mapet.jobs.export.config import CONFIGS, SUFFIXES


def run(form: str, call: Call) -> int:
    """Export."""
    from mapet.jobs.export.run import export_model

    result = export_model(form, call.values, call.out)
    if call.flags.json:
        print(json.dumps(result))
        return 0
    call.say(
        f"written: {result['path']}, {result['bytes'] / 1e6:.1f} MB; largest difference to the model on "
        f"{result['images']} images of {result['checked_on']}: {result['largest_difference']:.2g}"
    )
    return 0


def _verb(form: str, what: str) -> Verb:
    suffix = SUFFIXES[form]
    return Verb(
        summary=f"export a model as {what}",
        about=f"Export a model as {what}.\nThe export is read back and compared with the model on real images "
        "before it is kept.",
        example=f"  mapet export {form} runs/classifier --out classifier{suffix}",
        configs=(CONFIGS[form],),
        run=partial(run, form),
        positional={"model": None},
        required=True,
        out="what to write; must not be there yet",
        out_metavar=f"FILE{suffix}" if suffix else "FOLDER",
        recipe=False,
        json="print the result as JSON",
    )


TIMM = _verb("timm", "a folder for timm and the Hugging Face hub, with a model card")
ONNX = _verb("onnx", "an ONNX file with a dynamic batch (needs 'mapet[onnx]')")
TORCH = _verb("torch", "a torch.export program with a dynamic batch")
