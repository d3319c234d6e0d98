from pathlib import Path

from rich.console import Console

from mapet.jobs.evaluate.run import Memo, evaluate


def test_memo_keeps_features_for_evaluations_of_the_same_model_and_images(exported_vit: Path, digits: Path) -> None:
    quiet = Console(quiet=True)
    given = {"model": str(exported_vit), "data": str(digits)}
    probe = {**given, "steps": 20, "lr": [0.3], "weight_decay": [1e-3], "seeds": 1}
    alone = [evaluate("knn", given, console=quiet), evaluate("linear", probe, console=quiet)]
    memo: Memo = {}
    assert [
        evaluate("knn", given, console=quiet, memo=memo),
        evaluate("linear", probe, console=quiet, memo=memo),
    ] == alone
    assert len(memo) == 1
    evaluate("knn", {**given, "features": "class"}, console=quiet, memo=memo)
    evaluate("knn", {**given, "seed": 1}, console=quiet, memo=memo)
    assert len(memo) == 3
