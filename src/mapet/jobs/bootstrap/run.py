"""Bootstrapped targets: each round pre-trains on ids of the features that the round before it learned.

The idea is HuBERT's (Hsu et al., 2106.07447), which does it for speech: no foreign teacher at all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from mapet.config.base import parse
from mapet.data.open import open_images
from mapet.engine.runfolder import check_out
from mapet.engine.trainer import Result
from mapet.errors import MapetError
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.pretrain.run import pretrain
from mapet.jobs.pretrain.settle import initial_backbone, settle_run

logger = logging.getLogger(__name__)

MOST_ROUNDS = 100


def bootstrap(
    values: Mapping[str, Any],
    out: str | Path,
    *,
    rounds: int = 1,
    block: int = -1,
    resume: bool = False,
    console: Console | None = None,
) -> list[Result]:
    """Pre-train on pixels, then again on ids fitted to the features so learned, ``rounds`` times.

    Args:
        values: configuration of every round, see ``PretrainConfig``; ``tokenizer`` and what belongs to its teacher are
            the first round's.
        out: a folder; the rounds' run folders are ``round0``, ``round1``, ... in it.
        rounds: after the first.
        block: of the last round's network whose features are clustered; -1 is the last.
        resume: continue where it was stopped, exactly.
        console: where progress is shown; None for standard error.

    Returns:
        the runs, of which the last may have been stopped early.

    Raises:
        MapetError: for input that cannot work.
    """
    if not 1 <= rounds <= MOST_ROUNDS:
        raise MapetError(f"rounds is {rounds}; bootstrapping takes 1 to {MOST_ROUNDS} after the first")
    for key, remedy in (("tokens", "leave --tokens out"), ("init", "leave --init out, or use mapet pretrain")):
        if values.get(key) is not None:
            raise MapetError(f"bootstrapping fits its own tokenizers to a network of random weights; {remedy}")
    given = parse(PretrainConfig, values, complete=True)
    check_out(given["data"], out)
    config = settle_run(given, len(open_images(given["data"])))
    if config.targets != "ids":
        raise MapetError(f"objective {config.objective!r} predicts {config.targets}, not token ids; choose another")
    blocks = len(initial_backbone(config).blocks)
    if not -blocks <= block < blocks:
        raise MapetError(f"block is {block}, but the network has {blocks}: take 0 to {blocks - 1}, or -1 for the last")
    root = Path(out)
    foreign = sorted(path.name for path in root.glob("*") if not re.fullmatch(r"round\d+", path.name))
    if foreign:
        raise MapetError(f"output folder {root} holds {foreign[0]!r}, no round; choose a new folder with --out")
    results: list[Result] = []
    for number in range(rounds + 1):
        asked = dict(values)
        if number:
            exported = results[-1].exported
            asked |= {"tokenizer": str(exported), "teacher_stage": block, "teacher_weights": None, "teacher_size": None}
        logger.info("round %d of %d: %s", number, rounds, asked.get("tokenizer") or "pixels")
        results.append(pretrain(asked, root / f"round{number}", resume=resume, console=console))
        if not results[-1].finished:
            break
    return results
