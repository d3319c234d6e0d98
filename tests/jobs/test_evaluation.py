from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mapet.jobs.evaluate.run import Memo, evaluate

QUIET = Console(quiet=True)


def test_features_are_extracted_once_for_several_measures(exported_vit: Path, digits: Path) -> None:
    given = {"model": str(exported_vit), "data": str(digits)}
    probe = {"steps": 20, "lr": [0.3], "weight_decay": [1e-3], "seeds": 1}
    alone = [evaluate("knn", given, console=QUIET), evaluate("linear", {**given, **probe}, console=QUIET)]
    memo: Memo = {}
    first = evaluate("knn", given, console=QUIET, memo=memo)
    (kept,) = memo.values()
    second = evaluate("linear", {**given, **probe}, console=QUIET, memo=memo)
    assert [first, second] == alone
    assert list(memo.values()) == [kept]
    assert memo[next(iter(memo))] is kept
    evaluate("knn", {**given, "features": "class"}, console=QUIET, memo=memo)
    evaluate("knn", {**given, "seed": 1}, console=QUIET, memo=memo)
    assert len(memo) == 3
