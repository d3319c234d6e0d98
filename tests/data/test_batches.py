from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mapet import MapetError
from mapet.data.batches import DamageTally, StepSampler, ViewDataset, in_order, load_batches, printable
from mapet.data.open import open_images
from mapet.data.seeds import Draws, Stream, fold_seed
from mapet.data.views import PlainView, TrainView

VIEW = PlainView((28, 28), (0.5,), (0.5,))


def test_every_epoch_visits_every_image_once_but_for_the_remainder() -> None:
    sampler = StepSampler(23, 5, seed=0, first_step=0, last_step=8)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 8
    for epoch in (0, 1):
        mine = [index for batch in batches for e, index in batch if e == epoch]
        assert len(mine) == len(set(mine)) == 20
    assert [i for _, i in batches[0]] != [i for _, i in batches[4]]


@pytest.mark.parametrize("start", [1, 3, 4, 7])
def test_starting_in_the_middle_gives_the_same_batches(start: int) -> None:
    whole = list(StepSampler(23, 5, seed=1, first_step=0, last_step=9))
    assert list(StepSampler(23, 5, seed=1, first_step=start, last_step=9)) == whole[start:]


def test_processes_and_micro_batches_share_a_step() -> None:
    whole = list(StepSampler(40, 12, seed=2, first_step=0, last_step=3))
    parts = [
        list(StepSampler(40, 12, seed=2, first_step=0, last_step=3, rank=rank, world=2, accumulate=3))
        for rank in range(2)
    ]
    for step in range(3):
        micro = [parts[rank][step * 3 + k] for rank in range(2) for k in range(3)]
        assert all(len(batch) == 2 for batch in micro)
        assert [key for batch in micro for key in batch] == whole[step]


def test_seeds_do_not_collide() -> None:
    seeds = {fold_seed(a, s, b, c) for a in range(9) for s in Stream for b in range(-1, 20) for c in range(50)}
    assert len(seeds) == 9 * len(Stream) * 21 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_workers_do_not_change_what_is_loaded(digits: Path) -> None:
    view = TrainView(28, 28, 0.3, 0.5, 0.4, (0.5,), (0.5,))
    dataset = ViewDataset(open_images(str(digits)), view, 1, Draws(3, 3))
    sampler = StepSampler(60, 16, seed=3, first_step=2, last_step=5)
    for alone, together in zip(load_batches(dataset, sampler, 0), load_batches(dataset, sampler, 2), strict=True):
        assert torch.equal(alone["images"], together["images"])
        assert torch.equal(alone["index"], together["index"])


def test_the_number_of_threads_does_not_change_what_is_loaded(photographs: Path) -> None:
    view = TrainView(224, 224, 0.3, 0.5, 0.4, (0.5,) * 3, (0.5,) * 3)
    dataset = ViewDataset(open_images(str(photographs)), view, 3, Draws(3, 3))
    before = torch.get_num_threads()
    try:
        samples = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            samples.append(torch.stack([dataset[0, index]["images"] for index in range(8)]))
            assert torch.get_num_threads() == threads
        assert torch.equal(*samples)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def damaged(digits: Path, tmp_path: Path) -> Path:
    """60 digits, one cut short and one that is text."""
    folder = tmp_path / "damaged"
    shutil.copytree(digits, folder)
    whole = (folder / "class 1" / "0.png").read_bytes()
    (folder / "class 1" / "0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "class 2" / "3.png").write_text("no image at all")
    return folder


def test_damaged_files_are_replaced_named_and_counted(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = open_images(str(damaged))
    tally = DamageTally(images, most_share=0.1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for batch in load_batches(ViewDataset(images, VIEW, 1), in_order(60, 20), 0):
                tally.add(batch["damaged"])
                assert batch["tokenizer_images"].shape == (20, 1, 28, 28)
                assert batch["tokenizer_images"].flatten(1).amax(1).min() > 0
    assert {images.keys[i] for i in tally.indices} == {"class 1/0.png", "class 2/3.png"}
    for key in ("class 1/0.png", "class 2/3.png"):
        assert caplog.text.count(f"skipped damaged image {key}") == 1


def test_names_that_would_break_the_log_are_escaped() -> None:
    assert printable("a\nb\x1b[31m\u00e9 \udce9.png") == "a\\nb\\x1b[31m\u00e9 \\udce9.png"


def test_too_many_damaged_files_stop_with_their_number(damaged: Path) -> None:
    images = open_images(str(damaged))
    tally = DamageTally(images, most_share=0.02)
    with pytest.raises(MapetError, match=r"2 of 60 images cannot be read.*class 1/0\.png.*--max-damaged"):
        for batch in load_batches(ViewDataset(images, VIEW, 1), in_order(60, 20), 0):
            tally.add(batch["damaged"])


def test_a_folder_of_rubbish_stops_at_once(tmp_path: Path) -> None:
    for number in range(80):
        (tmp_path / f"{number}.jpg").write_text("rubbish")
    images = open_images(str(tmp_path))
    batch = next(iter(load_batches(ViewDataset(images, VIEW, 1), in_order(80, 4), 0)))
    with pytest.raises(MapetError, match="50 files drawn in a row cannot be read"):
        DamageTally(images, most_share=1.0).add(batch["damaged"])


def test_a_process_that_fails_ends_with_its_loading_processes(digits: Path) -> None:
    """These ignore the signal by which Python asks child processes to end, and then waits for them."""
    script = f"""
from mapet.data import PlainView, ViewDataset, in_order, load_batches, open_images
images = open_images({str(digits)!r})
batches = iter(load_batches(ViewDataset(images, PlainView((28, 28), (0.5,), (0.5,)), 1), in_order(60, 2), workers=1))
next(batches)
raise RuntimeError("the device is out of memory")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "out of memory" in done.stderr


def test_a_batch_of_unreadable_images_is_refused_also_where_digests_are_asked_for(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.jpg").write_text("rubbish")
    dataset = ViewDataset(open_images(str(tmp_path)), VIEW, 1, digests=True)
    batch = next(iter(load_batches(dataset, in_order(60, 4), 0)))
    assert batch["digest"].shape == (4, 32)
    with pytest.raises(MapetError, match="50 files drawn in a row cannot be read"):
        DamageTally(dataset.images, most_share=1.0).add(batch["damaged"])
