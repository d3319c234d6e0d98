from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from mapet.report.progress import Baseline, ProgressSink

BASELINE = Baseline(entropy=3.0, chance=0.2)


@pytest.mark.parametrize("terminal", [True, False])
def test_it_says_where_the_run_is_and_whether_it_is_learning(terminal: bool) -> None:
    text = io.StringIO()
    sink = ProgressSink(Console(file=text, force_terminal=terminal, width=80), BASELINE.describe, 0, 4)
    for step, loss in enumerate((3.5, 3.2, 2.5, 2.25)):
        record = {"step": step, "loss": loss, "accuracy": 0.31}
        sink.write(record | ({"eval_knn": 0.75} if step == 3 else {}))
    sink.close()
    shown = " ".join(Text.from_ansi(text.getvalue()).plain.split())  # however the lines were broken
    assert "4/4" in shown
    assert "ETA" in shown
    assert "0.75 nats below unigram" in shown
    assert "31.0% (chance 20.0%)" in shown
    assert "knn 0.750" in shown


def test_verdict() -> None:
    assert "not yet" in BASELINE.verdict(3.0)
    assert "not yet" in BASELINE.verdict(float("nan"))
    assert "1.00 nats below" in BASELINE.verdict(2.0)
