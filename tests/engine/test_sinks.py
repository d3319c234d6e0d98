import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mapet.engine.runfolder import RunFolder
from mapet.engine.sinks import SINKS


def test_records_are_visible_at_once_without_those_that_a_killed_run_left(tmp_path: Path) -> None:
    for first, value in ((0, 1.0), (2, 2.0)):
        sinks = [make() for make in SINKS.values()]
        for sink in sinks:
            sink.begin(RunFolder(tmp_path), first, total_steps=4)
        for step in range(first, 4):
            for sink in sinks:
                sink.write({"step": step, "loss": value, "grad_norm": None})
            lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines] == list(range(step + 1))
        for sink in sinks:
            sink.close()
    assert [line["loss"] for line in lines] == [1.0, 1.0, 2.0, 2.0]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]
    assert events.Tags()["scalars"] == ["loss"]
