"""``mapet tokenizer VERB``: visual tokenizers and stores of their ids."""

import json
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console

from mapet.config.verb import Call, Verb
from mapet.data.names import check_images
from mapet.jobs.tokenizer.config import CheckConfig, EncodeConfig, FitConfig, ReportConfig, VQKDConfig

JSON = "print the results as JSON"
IMAGES = {"data": "images; may also stand in the recipe"}


def run_fit(call: Call) -> int:
    """Fit a tokenizer."""
    from mapet.jobs.tokenizer.fit import fit_tokenizer

    _, report = fit_tokenizer(call.values, call.out, console=call.console)
    if report is not None:
        remark = f"tokenizer and pictures: {call.out}\nuse it: mapet pretrain ... --tokenizer {call.out}"
        _show_report(call, report, {"tokenizer": call.out}, remark)
    return 0


def run_train(call: Call) -> int:
    """Train a VQ-KD tokenizer."""
    from mapet.jobs.tokenizer.train import train_vqkd

    result = train_vqkd(call.values, call.out, resume=call.flags.resume, console=call.console)
    if result.is_main and call.flags.json:
        figures = {"steps": result.steps, "total_steps": result.total_steps, "stopped_by": result.stopped_by}
        print(json.dumps({**figures, "tokenizer": str(result.exported)}))
    if (status := call.unfinished(result)) is not None:
        return status
    call.say(f"done: use it with --tokenizer {call.out}")
    return 0


def run_report(call: Call) -> int:
    """Report on a tokenizer."""
    from mapet.jobs.tokenizer.fit import report_on_tokenizer

    report = report_on_tokenizer(call.values, call.out, console=call.console)
    _show_report(call, report, {}, f"pictures: {call.out}")
    return 0


def _show_report(call: Call, report: Any, names: dict[str, str], remark: str) -> None:
    """Print a ``CodebookReport`` as JSON, after ``names``, or as a table with a remark."""
    from mapet.jobs.tokenizer.codebook import report_table

    if call.flags.json:
        print(json.dumps({**names, **asdict(report)}))
    else:
        Console().print(report_table(report).to_terminal())
        call.say(remark)


def run_encode(call: Call) -> int:
    """Encode images into a token store."""
    from mapet.jobs.tokenizer.encode import encode_images

    result = encode_images(call.values, call.out, console=call.console)
    if not result.pop("is_main"):
        return 0
    if call.flags.json:
        print(json.dumps({"tokens": call.out, **result}))
    else:
        call.say(
            f"{result['encoded']} images encoded in {result['views']} views each, {result['kept']} kept as they were, "
            f"{result['damaged']} damaged, {result['absent']} in the store only; {result['seconds']:.1f} s\n"
            f"use it: mapet pretrain ... --tokens {call.out}"
        )
    return 0


def run_check(call: Call) -> int:
    """Check a token store; the exit status is 1 if something is wrong with it."""
    from mapet.jobs.tokenizer.encode import check_tokens

    found = check_tokens(call.values, console=call.console)
    if call.flags.json:
        print(json.dumps(found))
        return 0 if found["ok"] else 1
    call.say(
        f"{found['rows']} images: {found['written']} with ids, {found['damaged']} damaged, {found['empty']} without "
        f"ids, {found['corrupt']} that fail their checksum"
    )
    for what in ("missing", "changed"):
        if found[what]:
            names = ", ".join(map(repr, found[what][:5])) + (", ..." if len(found[what]) > 5 else "")
            call.say(f"{what}: {len(found[what])} images: {names}")
    if found["agreement"] is not None:
        call.say(f"ids made again: {found['agreement']:.2%} are the same")
    if not found["ok"]:
        call.say("bring it up to date with: mapet tokenizer encode")
    return 0 if found["ok"] else 1


_on_images = partial(Verb, positional=IMAGES, json=JSON, check_data=check_images)
FIT = _on_images(
    summary="fit a codebook by k-means over pixels or a teacher's features",
    example="  mapet tokenizer fit ./photos --teacher vit_small_patch14_dinov2.lvd142m --out tok",
    configs=(FitConfig,),
    run=run_fit,
    out="the tokenizer's folder",
)
TRAIN = _on_images(
    summary="train a VQ-KD tokenizer (BEiT v2) on a teacher's features",
    example="  mapet tokenizer train ./photos --teacher vit_base_patch16_clip_224.openai --out vqkd",
    configs=(VQKDConfig,),
    run=run_train,
    out="the run folder; the tokenizer is in it",
    resume="continue the run in --out exactly, or begin it",
)
REPORT = _on_images(
    summary="measure a codebook on images: usage, entropy, pictures",
    example="  mapet tokenizer report ./photos --tokenizer tok --out report",
    configs=(ReportConfig,),
    run=run_report,
    out="the report's folder",
)
ENCODE = _on_images(
    summary="make the ids of all images once, or bring them up to date",
    example="  mapet tokenizer encode ./photos --tokenizer tok --out tokens",
    configs=(EncodeConfig,),
    run=run_encode,
    out="the token store's folder; a store that is there is completed",
)
CHECK = Verb(
    summary="verify a token store: files, images, a sample of the ids",
    example="  mapet tokenizer check ./photos --tokens tokens",
    configs=(CheckConfig,),
    run=run_check,
    positional={"data": None},
    recipe=False,
    json=JSON,
)
