"""``mapet tokenizer VERB``: visual tokenizers and stores of their ids."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from rich.console import Console

from mapet.cli.console import set_up_logging
from mapet.cli.flags import add_config_flags, add_job_flags, given_values
from mapet.jobs.tokenizer.config import CheckConfig, EncodeConfig, FitConfig, ReportConfig, VQKDConfig


def add_parser(verbs: Any) -> None:
    """Declare the verb and its own verbs."""
    parser = verbs.add_parser(
        "tokenizer",
        help="fit, judge and apply visual tokenizers",
        description="Visual tokenizers turn images into the ids that are predicted: fit or train one on your own "
        "images, see whether it is any good, and make the ids of all images once.",
    )
    own = parser.add_subparsers(dest="tokenizer_verb", required=True, metavar="VERB")

    fit = own.add_parser("fit", help="fit a codebook by k-means over pixels or a teacher's features")
    add_job_flags(fit, FitConfig, "the tokenizer's folder")
    fit.set_defaults(run=run_fit)

    train = own.add_parser("train", help="train a VQ-KD tokenizer (BEiT v2) on a teacher's features")
    train.add_argument("--resume", action="store_true", help="continue the run in --out exactly, or begin it")
    add_job_flags(train, VQKDConfig, "the run folder; the tokenizer is in it")
    train.set_defaults(run=run_train)

    report = own.add_parser("report", help="how a tokenizer does on images: usage, entropies, pictures")
    add_job_flags(report, ReportConfig, "the report's folder")
    report.set_defaults(run=run_report)

    encode = own.add_parser("encode", help="make the ids of all images once, or bring them up to date")
    add_job_flags(encode, EncodeConfig, "the token store's folder; one that is there is completed")
    encode.set_defaults(run=run_encode)

    check = own.add_parser("check", help="verify a token store: files, images, a sample of the ids")
    check.add_argument("data", nargs="?", help="the images; left out, only the store itself is verified")
    add_config_flags(check, CheckConfig)
    check.set_defaults(run=run_check)

    for verb in (fit, train, report, encode, check):
        verb.add_argument("--json", action="store_true", help="print what came of it as JSON")


def run_fit(parsed: argparse.Namespace) -> int:
    """Fit a tokenizer."""
    console = set_up_logging()
    from mapet.jobs.tokenizer.codebook import report_table
    from mapet.jobs.tokenizer.fit import fit_tokenizer

    _, report = fit_tokenizer(given_values(parsed, FitConfig), parsed.out, console=console)
    if report is None:
        return 0
    if parsed.json:
        print(json.dumps({"tokenizer": parsed.out, **asdict(report)}))
    else:
        Console().print(report_table(report))
        console.print(
            f"tokenizer and pictures: {parsed.out}\nuse it: mapet pretrain ... --tokenizer {parsed.out}", soft_wrap=True
        )
    return 0


def run_train(parsed: argparse.Namespace) -> int:
    """Train a VQ-KD tokenizer."""
    console = set_up_logging()
    from mapet.jobs.tokenizer.train import train_vqkd

    result = train_vqkd(given_values(parsed, VQKDConfig), parsed.out, resume=parsed.resume, console=console)
    if not result.pop("is_main"):
        return 0
    if parsed.json:
        print(json.dumps(result))
    if result["steps"] < result["total_steps"]:
        console.print(f"stopped and saved after step {result['steps']}; --resume continues {parsed.out}")
        return 128 + (result["stopped_by"] or 0)
    console.print(f"done: use it with --tokenizer {parsed.out}", soft_wrap=True)
    return 0


def run_report(parsed: argparse.Namespace) -> int:
    """Report on a tokenizer."""
    console = set_up_logging()
    from mapet.jobs.tokenizer.codebook import report_table
    from mapet.jobs.tokenizer.fit import report_on_tokenizer

    report = report_on_tokenizer(given_values(parsed, ReportConfig), parsed.out, console=console)
    if parsed.json:
        print(json.dumps(asdict(report)))
    else:
        Console().print(report_table(report))
        console.print(f"pictures: {parsed.out}", soft_wrap=True)
    return 0


def run_encode(parsed: argparse.Namespace) -> int:
    """Encode images into a token store."""
    console = set_up_logging()
    from mapet.jobs.tokenizer.encode import encode_images

    result = encode_images(given_values(parsed, EncodeConfig), parsed.out, console=console)
    if not result.pop("is_main"):
        return 0
    if parsed.json:
        print(json.dumps({"tokens": parsed.out, **result}))
    else:
        console.print(
            f"{result['encoded']} images encoded in {result['views']} views each, {result['kept']} kept as they were, "
            f"{result['damaged']} damaged, {result['absent']} in the store only; {result['seconds']:.1f} s\n"
            f"use it: mapet pretrain ... --tokens {parsed.out}",
            soft_wrap=True,
        )
    return 0


def run_check(parsed: argparse.Namespace) -> int:
    """Check a token store; the exit status is 1 if it is not as it should be."""
    console = set_up_logging()
    from mapet.jobs.tokenizer.encode import check_tokens

    found = check_tokens(given_values(parsed, CheckConfig), console=console)
    if parsed.json:
        print(json.dumps(found))
        return 0 if found["ok"] else 1
    console.print(
        f"{found['rows']} images: {found['written']} with ids, {found['damaged']} damaged, {found['empty']} without "
        f"ids, {found['corrupt']} that fail their checksum",
        soft_wrap=True,
    )
    for what in ("missing", "changed"):
        if found[what]:
            names = ", ".join(map(repr, found[what][:5])) + (", ..." if len(found[what]) > 5 else "")
            console.print(f"{what}: {len(found[what])} images: {names}", soft_wrap=True, markup=False)
    if found["agreement"] is not None:
        console.print(f"ids made again: {found['agreement']:.2%} are the same")
    if not found["ok"]:
        console.print("bring it up to date with: mapet tokenizer encode", soft_wrap=True)
    return 0 if found["ok"] else 1
