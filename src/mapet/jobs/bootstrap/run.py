"""Bootstrapped targets: each round pre-trains on ids of the features that the previous round learned.

The idea is that of HuBERT (Hsu et al., 2106.07447) for speech: no foreign teacher is needed.
"""

import logging
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
    """Pre-train on pixels, then ``rounds`` times on ids fitted to the features that the previous round learned.

    Args:
        values: configuration of every round, see ``PretrainConfig``; ``tokenizer`` and the keys of its teacher are for
            the first round.
        out: a folder; the run folders ``round0``, ``round1``, ... are made in it.
        rounds: number of rounds after the first.
        block: block of the previous round's network whose features are clustered; -1 is the last.
        resume: continue an interrupted bootstrap exactly.
        console: where progress is shown; None for standard error.

    Returns:
        the results of the rounds; the last round may have been stopped early.

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
    results: list[Result] = []
    asked = dict(values)
    for number in range(rounds + 1):
        logger.info("round %d of %d: %s", number, rounds, asked.get("tokenizer") or "pixels")
        results.append(pretrain(asked, Path(out) / f"round{number}", resume=resume, console=console))
        if not results[-1].finished:
            break
        asked |= {"tokenizer": str(results[-1].exported), "teacher_stage": block}
        asked |= {"teacher_weights": None, "teacher_size": None}
    return results
