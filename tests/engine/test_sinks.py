from __future__ import annotations

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mapet.engine.sinks import JsonLines, TensorBoard


def test_json_lines_are_visible_at_once_and_appended(tmp_path: Path) -> None:
    for step in range(2):
        sink = JsonLines(tmp_path / "metrics.jsonl")
        sink.write({"step": step, "loss": 0.1})
        assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step
        sink.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_tensorboard_hides_what_a_killed_run_left(tmp_path: Path) -> None:
    for first, value in ((0, 1.0), (2, 2.0)):
        sink = TensorBoard(tmp_path, first)
        for step in range(first, 4):
            sink.write({"step": step, "loss": value, "grad_norm": None})
        sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]
    assert events.Tags()["scalars"] == ["loss"]
