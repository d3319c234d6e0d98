"""``mapet export FORMAT``: a trained model as a file or folder that others can use."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_config_flags, add_out_flag, given_values
from mapet.jobs.export.config import CONFIGS, SUFFIXES

HELP = {
    "timm": "a folder for timm and the Hugging Face hub, with a model card",
    "onnx": "an ONNX file with a dynamic batch (needs 'mapet[onnx]')",
    "torch": "a torch.export program with a dynamic batch",
}


def add_parser(verbs: Any) -> None:
    """Declare the verb and its formats."""
    parser = verbs.add_parser(
        "export",
        help="write a model for timm and the hub, for ONNX Runtime, or for torch.export",
        description="Write a trained model for others to use. Each export is read back and compared with the model on "
        "real images, in batches of several sizes, before it is kept.",
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, config_class in CONFIGS.items():
        form = formats.add_parser(name, help=HELP[name], description=f"Export a model as {HELP[name]}.")
        form.add_argument("model", help=config_class.model_fields["model"].description)
        add_out_flag(
            form, "what to write; must not be there yet", f"FILE{SUFFIXES[name]}" if SUFFIXES[name] else "FOLDER"
        )
        form.add_argument("--json", action="store_true", help="print the result as JSON")
        add_config_flags(form, config_class, left_out=("model",))
        form.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Export."""
    console = set_up_logging()
    from mapet.jobs.export.run import export_model

    result = export_model(parsed.format, given_values(parsed, CONFIGS[parsed.format]), parsed.out)
    if parsed.json:
        print(json.dumps(result))
    else:
        console.print(
            f"written: {result['path']}, {result['bytes'] / 1e6:.1f} MB; largest difference to the model on "
            f"{result['images']} images of {result['checked_on']}: {result['largest_difference']:.2g}",
            soft_wrap=True,
            markup=False,
        )
    return 0
