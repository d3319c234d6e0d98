"""``mapet convert KIND FILE``: published checkpoints of others in, a folder for timm and every command out."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_config_flags, add_out_flag, given_values
from mapet.jobs.convert.config import ConvertConfig

KINDS = {
    "upstream": "a file of MaPeT's authors: a classifier, or a pre-training checkpoint",
    "beit": "a BEiT file: pre-trained or fine-tuned",
    "beitv2": "a BEiT v2 file: pre-trained or fine-tuned",
    "mae": "an MAE ViT file: pre-trained, with or without decoder, or fine-tuned",
}


def add_parser(verbs: Any) -> None:
    """Declare the verb and its own verbs."""
    parser = verbs.add_parser(
        "convert",
        help="turn a published checkpoint into a folder for timm and every command",
        description="Turn a published checkpoint into an exported folder. Nothing in the file is executed, and no "
        "weight of it is dropped in silence.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, text in KINDS.items():
        own = kinds.add_parser(kind, help=text, description=f"Convert {text}.")
        own.add_argument("file", help=ConvertConfig.model_fields["file"].description)
        add_out_flag(own, "the folder, which is new")
        add_config_flags(own, ConvertConfig, left_out=("kind", "file"))
        own.add_argument("--json", action="store_true", help="print what came of it as JSON")
        own.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Convert."""
    console = set_up_logging()
    from mapet.jobs.convert.run import convert

    result = convert(given_values(parsed, ConvertConfig), parsed.out)
    if parsed.json:
        print(json.dumps({"folder": parsed.out, **result}))
        return 0
    what = f"classifier of {result['classes']} classes" if result["classes"] else "network without a classifier"
    assumed = " (assumed: the file does not tell; else say --num-heads)" if result["num_heads_assumed"] else ""
    more = ", mask vector and head beside it" if result["pretraining"] else ""
    console.print(
        f"{result['architecture']}, {what}, {result['image_size']} px, {result['num_heads']} attention heads{assumed}"
        f"{more}: {parsed.out}\n"
        f'use it: timm.create_model("local-dir:{parsed.out}", pretrained=True)',
        soft_wrap=True,
        markup=False,
    )
    return 0
