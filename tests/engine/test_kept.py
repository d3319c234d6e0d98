from pathlib import Path

from mapet.engine.kept import LossWatch, keep_checkpoint, kept_checkpoints


def test_the_newest_is_kept_and_others_are_spread_over_the_run(tmp_path: Path) -> None:
    last = tmp_path / "last"
    last.mkdir()
    for step in range(0, 1001, 100):
        (last / "x").unlink(missing_ok=True)
        (last / "x").write_text(str(step))
        keep_checkpoint(last, step, 3)
        keep_checkpoint(last, step, 3)
    kept = kept_checkpoints(tmp_path)
    assert len(kept) == 3
    assert max(kept) == 1000
    assert all(gap >= 300 for gap in (min(kept), 1000 - sorted(kept)[1]))
    assert {step: (path / "x").read_text() for step, path in kept.items()} == {step: str(step) for step in kept}
    assert (last / "x").stat().st_nlink == 2, "while it is the last one, it takes no space"
    keep_checkpoint(last, 1000, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"last", "step-00001000"}


def test_a_loss_has_risen_when_its_median_is_a_tenth_above_the_lowest() -> None:
    watch = LossWatch()
    assert not watch.has_risen()
    for loss in [3.0] * 100:
        watch.add(loss)
    assert not watch.has_risen()
    assert watch.lowest == 3.0
    for loss in [2.0] * 60 + [100.0] * 40:  # a few peaks do not count
        watch.add(loss)
    assert not watch.has_risen()
    assert watch.lowest == 2.0
    for loss in [2.19] * 100:
        watch.add(loss)
    assert not watch.has_risen()
    for loss in [2.21] * 100:
        watch.add(loss)
    assert watch.has_risen()
    again = LossWatch(watch.lowest)
    again.add(float("nan"))
    assert again.has_risen()
