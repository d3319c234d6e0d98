"""Whole jobs, put together from the parts below: what the command line and Python users call."""

from mapet.workflows.demo import measure_run, run_demo
from mapet.workflows.pretrain import RunResult, initial_backbone, pretrain

__all__ = ["RunResult", "initial_backbone", "measure_run", "pretrain", "run_demo"]
