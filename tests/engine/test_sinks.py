import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mapet.config.base import settle
from mapet.config.keys import TrainKeys
from mapet.engine.runfolder import RunFolder
from mapet.engine.sinks import SINKS, RunFacts


def begin(name: str, folder: Path, first_step: int = 0):  # type: ignore[no-untyped-def]
    sink = SINKS[name]()
    sink.begin(RunFacts(RunFolder(folder), settle(TrainKeys, {"data": "d"}, images=9), first_step, total_steps=4))
    return sink


def test_json_lines_are_visible_at_once_without_records_that_a_killed_run_left(tmp_path: Path) -> None:
    for first, value in ((0, 1.0), (2, 2.0)):
        sink = begin("jsonl", tmp_path, first)
        for step in range(first, 4):
            sink.write({"step": step, "loss": value})
            lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines] == list(range(step + 1))
        sink.close()
    assert [line["loss"] for line in lines] == [1.0, 1.0, 2.0, 2.0]


def test_tensorboard_hides_records_that_a_killed_run_left(tmp_path: Path) -> None:
    for first, value in ((0, 1.0), (2, 2.0)):
        sink = begin("tensorboard", tmp_path, first)
        for step in range(first, 4):
            sink.write({"step": step, "loss": value, "grad_norm": None})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]
    assert events.Tags()["scalars"] == ["loss"]
