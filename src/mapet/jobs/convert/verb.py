"""``mapet convert upstream FILE``: a checkpoint of MaPeT's authors becomes a folder for timm and every command."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_config_flags, add_out_flag, given_values
from mapet.errors import MapetError
from mapet.jobs.convert.config import ConvertConfig

# Methods whose published weights timm ships: an example of timm's name for each.
SHIPPED_BY_TIMM = {
    "mae": "vit_base_patch16_224.mae",
    "beit": "beit_base_patch16_224.in22k_ft_in22k_in1k",
    "beitv2": "beitv2_base_patch16_224.in1k_ft_in22k_in1k",
}


def add_parser(verbs: Any) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "convert",
        help="turn a checkpoint of MaPeT's authors into a folder for timm and every command",
        description="Turn a checkpoint of MaPeT's authors, a classifier or a pre-training checkpoint, into an exported "
        "folder. No code in the file is run, and a weight that does not fit is an error. Published weights of MAE, "
        "BEiT and BEiT v2 need no conversion: every command takes timm's names for them.",
    )
    parser.add_argument("kind", type=_check_kind, metavar="upstream", help="the word upstream")
    parser.add_argument("file", help=ConvertConfig.model_fields["file"].description)
    add_out_flag(parser, "the folder, which is new")
    add_config_flags(parser, ConvertConfig, left_out=("file",))
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def _check_kind(kind: str) -> str:
    if name := SHIPPED_BY_TIMM.get(kind):
        raise MapetError(
            f"mapet convert does not take {kind} files, because timm ships these weights: use {name!r} or another name "
            f"of timm's as the model, or read FILE with timm.create_model({name!r}, pretrained=True, "
            "pretrained_cfg_overlay={'file': FILE})"
        )
    if kind != "upstream":
        raise argparse.ArgumentTypeError(f"{kind!r} cannot be converted; write mapet convert upstream FILE")
    return kind


def run(parsed: argparse.Namespace) -> int:
    """Convert."""
    console = set_up_logging()
    from mapet.jobs.convert.run import convert

    result = convert(given_values(parsed, ConvertConfig), parsed.out)
    if parsed.json:
        print(json.dumps({"folder": parsed.out, **result}))
        return 0
    what = f"classifier of {result['classes']} classes" if result["classes"] else "network without a classifier"
    assumed = " (assumed: the file does not tell; if wrong, pass --num-heads)" if result["num_heads_assumed"] else ""
    more = ", mask vector and head beside it" if result["pretraining"] else ""
    console.print(
        f"{result['architecture']}, {what}, {result['image_size']} px, {result['num_heads']} attention heads{assumed}"
        f"{more}: {parsed.out}\n"
        f'use it: timm.create_model("local-dir:{parsed.out}", pretrained=True)',
        soft_wrap=True,
        markup=False,
    )
    return 0
