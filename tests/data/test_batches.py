import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mapet import MapetError
from mapet.data.batches import DamageTally, StepSampler, ViewDataset, draw_batches, in_order, load_batches, printable
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.data.seeds import Draws
from mapet.data.views import PlainView, TrainView

VIEW = PlainView((28, 28), (0.5,), (0.5,))


def test_every_epoch_has_each_image_once_except_the_remainder() -> None:
    sampler = StepSampler(23, 5, seed=0, first_step=0, last_step=8)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 8
    for epoch in (0, 1):
        mine = [index for batch in batches for e, index in batch if e == epoch]
        assert len(mine) == len(set(mine)) == 20
    assert [i for _, i in batches[0]] != [i for _, i in batches[4]]


def test_batches_do_not_depend_on_the_first_step() -> None:
    whole = list(StepSampler(23, 5, seed=1, first_step=0, last_step=9))
    for start in (1, 3, 4, 7):
        assert list(StepSampler(23, 5, seed=1, first_step=start, last_step=9)) == whole[start:]


def test_a_step_is_cut_into_processes_and_micro_batches() -> None:
    whole = list(StepSampler(40, 12, seed=2, first_step=0, last_step=3))
    parts = [
        list(StepSampler(40, 12, seed=2, first_step=0, last_step=3, rank=rank, world=2, accumulate=3))
        for rank in range(2)
    ]
    for step in range(3):
        micro = [parts[rank][step * 3 + k] for rank in range(2) for k in range(3)]
        assert all(len(batch) == 2 for batch in micro)
        assert [key for batch in micro for key in batch] == whole[step]


def test_batches_do_not_depend_on_the_number_of_workers(digits: Path) -> None:
    view = TrainView(28, 28, 0.3, 0.5, 0.4, (0.5,), (0.5,))
    dataset = ViewDataset(open_images(str(digits)), view, Reading(1), Draws(3, 3))
    sampler = StepSampler(60, 16, seed=3, first_step=2, last_step=5)
    for alone, together in zip(load_batches(dataset, sampler, 0), load_batches(dataset, sampler, 2), strict=True):
        assert torch.equal(alone["images"], together["images"])
        assert torch.equal(alone["index"], together["index"])


def test_images_of_eight_and_of_more_bits_are_in_one_batch(tmp_path: Path) -> None:
    Image.fromarray(np.full((30, 30), 255, np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)).save(tmp_path / "16.png")
    dataset = ViewDataset(open_images(str(tmp_path)), TrainView(28, 28, 1.0, 0.0, 0.0, (0.0,), (1.0,)), Reading(1))
    deep, plain = next(load_batches(dataset, in_order(2, 2), 0))["tokenizer_images"]
    assert (plain == 1).all()
    assert (deep.dtype, plain.dtype) == (torch.float32, torch.float32)
    assert 0.9 < deep.max() <= 1
    assert deep.std() > 0.1


def test_views_do_not_depend_on_the_number_of_threads(photographs: Path) -> None:
    view = TrainView(224, 224, 0.3, 0.5, 0.4, (0.5,) * 3, (0.5,) * 3)
    dataset = ViewDataset(open_images(str(photographs)), view, Reading(3), Draws(3, 3))
    before = torch.get_num_threads()
    samples = []
    for threads in (1, 4, before):
        torch.set_num_threads(threads)
        samples.append(torch.stack([dataset[0, index]["cut"].tokenizer_image for index in range(8)]))
        assert torch.get_num_threads() == threads
    assert torch.equal(samples[0], samples[1])


def test_damaged_files_are_replaced_logged_once_and_counted(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "damaged"))
    (folder / "class 1" / "0.png").write_bytes((digits / "class 1" / "0.png").read_bytes()[:100])
    (folder / "class 2" / "3.png").write_text("no image")
    images = open_images(str(folder))
    tally = DamageTally(images, most_share=0.1)
    for _ in range(2):
        for batch in load_batches(ViewDataset(images, VIEW, Reading(1), digests=True), in_order(60, 20), 0):
            tally.add(batch["damaged"])
            assert batch["images"].shape == (20, 1, 28, 28)
            assert batch["tokenizer_images"].flatten(1).amax(1).min() > 0
            for index, digest in zip(batch["index"].tolist(), batch["digest"], strict=True):
                assert torch.equal(digest, images.digest(index))
    assert {images.keys[i] for i in tally.indices} == {"class 1/0.png", "class 2/3.png"}
    for key in ("class 1/0.png", "class 2/3.png"):
        assert caplog.text.count(f"skipped damaged image {key}") == 1
    with pytest.raises(MapetError, match=r"2 of 60 images cannot be read.*class 1/0\.png.*--max-damaged"):
        replace(tally, most_share=0.02).add([])


def test_control_characters_in_names_are_escaped() -> None:
    assert printable("a\nb\x1b[31m\u00e9 \udce9.png") == "a\\nb\\x1b[31m\u00e9 \\udce9.png"


def test_a_folder_of_unreadable_files_is_an_error_in_the_first_batch(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.jpg").write_text("no image")
    dataset = ViewDataset(open_images(str(tmp_path)), VIEW, Reading(1), digests=True)
    batch = next(iter(load_batches(dataset, in_order(60, 4), 0)))
    assert batch["digest"].shape == (4, 32)
    with pytest.raises(MapetError, match="50 files drawn in a row cannot be read"):
        DamageTally(dataset.images, most_share=1.0).add(batch["damaged"])


def test_random_batches_have_each_image_once() -> None:
    batches = draw_batches(50, 20, 8, epoch=3, seed=1)
    assert [len(batch) for batch in batches] == [8, 8, 4]
    keys = {key for batch in batches for key in batch}
    assert len(keys) == 20
    assert {epoch for epoch, _ in keys} == {3}
    assert draw_batches(50, 20, 8, epoch=3, seed=1) == batches != draw_batches(50, 20, 8, epoch=3, seed=2)
    assert sum(map(len, draw_batches(5, 20, 8, 0, 0))) == 5


def test_loading_processes_end_after_an_error(digits: Path) -> None:
    """They ignore SIGTERM, with which Python asks child processes to end before it waits for them."""
    script = f"""
from mapet.data.batches import ViewDataset, in_order, load_batches
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.data.views import PlainView
view = PlainView((28, 28), (0.5,), (0.5,))
images = open_images({str(digits)!r})
batches = iter(load_batches(ViewDataset(images, view, Reading(1)), in_order(60, 2), workers=1))
next(batches)
raise RuntimeError("the device is out of memory")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "out of memory" in done.stderr
