"""Branches: a new run that begins with a checkpoint of another one, and may differ in how it is optimised."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mapet.config.base import config_to_yaml, continued, read_recipe
from mapet.engine.files import replace_file
from mapet.engine.kept import kept_checkpoints
from mapet.engine.lineage import record_origin
from mapet.engine.runfolder import RunFolder
from mapet.errors import MapetError
from mapet.jobs.pretrain.config import PretrainConfig

# Keys that a branch may change, besides those that a resumed run may change.
CHANGEABLE = {"lr", "min_lr", "warmup", "weight_decay", "clip_grad", "precision", "compile", "drop_path"}


def begin_branch(source: str | Path, step: int | None, values: Mapping[str, Any], folder: RunFolder) -> None:
    """Make a run folder that ``--resume`` continues; the other run stays as it is.

    Args:
        source: the other run's folder.
        step: of the checkpoint; None for the newest that was kept.
        values: the changed configuration.
        folder: of the new run.

    Raises:
        MapetError: if there is no such run or checkpoint, or a value may not change.
    """
    run = RunFolder(source)
    if not run.config.is_file():
        raise MapetError(f"--branch-of {source} is no run folder: it has no config.yaml")
    kept = kept_checkpoints(run.checkpoint.parent)
    if not kept:
        raise MapetError(f"run {source} has kept no checkpoint; it can only be continued as it is, with --resume")
    step = max(kept) if step is None else step
    if step not in kept:
        raise MapetError(f"run {source} has kept no checkpoint of step {step}, but of {', '.join(map(str, kept))}")
    config = continued(PretrainConfig, read_recipe(run.config), values, run.root, CHANGEABLE)
    if folder.config.exists():
        raise MapetError(f"output folder {folder.root} already holds a run; choose another --out")
    folder.root.mkdir(parents=True, exist_ok=True)
    record_origin(folder, str(source))
    for file, target in ((run.baseline, folder.baseline), (run.metrics, folder.metrics)):
        if file.exists():
            shutil.copyfile(file, target)
    for part, target in ((run.tokenizer, folder.tokenizer), (kept[step], folder.checkpoint)):
        if part.exists():
            shutil.copytree(part, target, dirs_exist_ok=True)
    replace_file(folder.config, config_to_yaml(config))  # from now on it is a run
