"""Whole jobs, put together from the parts below: what the command line and Python users call."""

from mapet.workflows.pretrain import RunResult, pretrain

__all__ = ["RunResult", "pretrain"]
