"""The engine: loop, checkpoints, optimiser, run folder."""

from mapet.engine.checkpoint import (
    MadeFrom,
    State,
    damaged_checkpoint,
    read_checkpoint,
    read_state,
    write_checkpoint,
)
from mapet.engine.files import claimed_folder, new_file, recover_folder, replace_file, replace_folder
from mapet.engine.loop import Evaluator, Plan, Targets, Trainee, agree, on_main, train
from mapet.engine.optimizer import build_optimizer
from mapet.engine.runfolder import RunFolder, explain_disk_errors, held_folder, run_of
from mapet.engine.schedule import warmup_cosine
from mapet.engine.sinks import JsonLines, Record, Sink, TensorBoard
from mapet.engine.stop import StopRequest

__all__ = [
    "Evaluator",
    "JsonLines",
    "MadeFrom",
    "Plan",
    "Record",
    "RunFolder",
    "Sink",
    "State",
    "StopRequest",
    "Targets",
    "TensorBoard",
    "Trainee",
    "agree",
    "build_optimizer",
    "claimed_folder",
    "damaged_checkpoint",
    "explain_disk_errors",
    "held_folder",
    "new_file",
    "on_main",
    "read_checkpoint",
    "read_state",
    "recover_folder",
    "replace_file",
    "replace_folder",
    "run_of",
    "train",
    "warmup_cosine",
    "write_checkpoint",
]
