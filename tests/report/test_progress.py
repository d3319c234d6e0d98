import io

import pytest
from rich.console import Console
from rich.text import Text

from mapet.engine.runfolder import RunFolder
from mapet.report.progress import Baseline, ProgressSink

IDS, FEATURES = Baseline("accuracy", 0.2, 3.0), Baseline("cosine", 0.2)


def plain(text: io.StringIO) -> str:
    return " ".join(Text.from_ansi(text.getvalue()).plain.split())


@pytest.mark.parametrize("terminal", [True, False])
def test_records_are_shown_beside_the_baseline(terminal: bool) -> None:
    text = io.StringIO()
    sink = ProgressSink(Console(file=text, force_terminal=terminal, width=80), IDS.describe)
    sink.begin(RunFolder("run"), 0, 4)
    for step, loss in enumerate((3.5, 3.2, 2.5, 2.25)):
        record = {
            "step": step,
            "loss": loss,
            "accuracy": 0.31,
            "images_per_s": 412.4,
            "data_wait": 0.05 + 0.1 * step,
            "mfu": 0.4,
        }
        sink.write(record | ({"eval_knn": 0.75} if step == 3 else {}))
    sink.close()
    for part in ("4/4", "ETA", "0.75 nats below unigram", "31.0% (chance 20.0%)", "knn 0.750", "412 images/s"):
        assert part in plain(text)
    assert "40% of the device's speed, 35% waiting for data" in plain(text)


@pytest.mark.parametrize(
    ("baseline", "record", "words"),
    [
        (IDS, {"loss": 3.0, "accuracy": 0.2}, "not yet below unigram"),
        (IDS, {"loss": float("nan"), "accuracy": 0.2}, "not yet below unigram"),
        (Baseline("accuracy", 0.2, 3.0, "target_loss"), {"target_loss": 2.5, "accuracy": 0}, "target loss 2.500"),
        (FEATURES, {"loss": 0.9, "cosine": 0.1}, "not yet above the mean"),
        (FEATURES, {"loss": 0.5, "cosine": 0.5}, "0.30 above the mean"),
    ],
)
def test_records_in_words(baseline: Baseline, record: dict[str, float], words: str) -> None:
    assert words in baseline.describe(record)
