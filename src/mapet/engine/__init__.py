"""The engine: configuration, loop, checkpoints, run folder."""

from mapet.engine.checkpoint import read_checkpoint, read_state, recover_folder, replace_folder, write_checkpoint
from mapet.engine.config import (
    PretrainConfig,
    config_to_yaml,
    free_keys,
    make_config,
    read_recipe,
)
from mapet.engine.loop import Evaluator, Plan, Trainee, train
from mapet.engine.optimizer import build_optimizer
from mapet.engine.runfolder import RunFolder, explain_disk_errors
from mapet.engine.schedule import warmup_cosine
from mapet.engine.sinks import JsonLines, Record, Sink, TensorBoard
from mapet.engine.stop import StopRequest

__all__ = [
    "Evaluator",
    "JsonLines",
    "Plan",
    "PretrainConfig",
    "Record",
    "RunFolder",
    "Sink",
    "StopRequest",
    "TensorBoard",
    "Trainee",
    "build_optimizer",
    "config_to_yaml",
    "explain_disk_errors",
    "free_keys",
    "make_config",
    "read_checkpoint",
    "read_recipe",
    "read_state",
    "recover_folder",
    "replace_folder",
    "train",
    "warmup_cosine",
    "write_checkpoint",
]
