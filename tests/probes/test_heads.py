from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mapet.probes.attentive import fit_attentive
from mapet.probes.features import Features
from mapet.probes.heads import Fit, Setting, Training, evaluate_probe, grid
from mapet.probes.linear import fit_linear

CPU = torch.device("cpu")


def clouds(count: int, patches: int | None = None, seed: int = 0) -> Features:
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 7
    x = np.eye(7)[y] * 2 + rng.normal(size=(count, 7))
    x = x.astype(np.float32) if patches is None else np.repeat(x[:, None], patches, axis=1).astype(np.float16)
    return Features(x, np.arange(count), y, tuple("abcdefg"))


def test_batches_show_every_image_once_a_pass() -> None:
    features = clouds(70)
    training = Training(seed=1, device=CPU, steps=4, batch_size=35)
    batches = list(training.batches(features))
    assert len(batches) == 4
    for half in (0, 2):
        shown = torch.cat([batches[half][0], batches[half + 1][0]])
        assert sorted(shown[:, 0].tolist()) == sorted(features.x[:, 0].tolist())
    assert not torch.equal(batches[0][0], batches[2][0])
    assert (Training(0, CPU).steps_for(100), Training(0, CPU).steps_for(512_000)) == (2000, 10_000)
    bounded = Training(0, CPU, batch_size=256, most_passes=300)
    assert [bounded.steps_for(n) for n in (2, 40, 256, 512, 100_000)] == [300, 300, 300, 600, 3906]
    assert replace(bounded, steps=7).steps_for(40) == 7


@pytest.mark.parametrize(("fit", "patches"), [(fit_linear, None), (fit_attentive, 3)])
def test_the_best_on_held_out_images_is_tested_and_seeds_decide(fit: Fit, patches: int | None) -> None:
    train, test = clouds(140, patches), clouds(70, patches, seed=1)
    settings = grid((1e-9, 1e-2), (0.0, 0.01))
    assert len(settings) == 4
    training = Training(seed=0, device=CPU, steps=60, batch_size=32)
    result = evaluate_probe(fit, train, test, settings, training)
    assert result.setting.lr == 1e-2
    assert result.held_out[result.setting] == max(result.held_out.values()) > result.held_out[settings[0]]
    assert result.scores.accuracy > 0.6
    assert result.scores.top5 is not None
    told: list[int] = []
    evaluate_probe(fit, train, test, settings, replace(training, show=told.append))
    assert told == list(range(1, 121)), "it trains twice, equally long"
    again, other = (evaluate_probe(fit, train, test, settings, Training(seed, CPU, 60, 32)) for seed in (0, 1))
    assert again.held_out == result.held_out
    assert np.array_equal(again.scores.confusion, result.scores.confusion)
    assert other.held_out != result.held_out
    wrong = replace(test, y=(test.y + 1) % 7)
    misled = evaluate_probe(fit, train, wrong, settings, training)
    assert (misled.setting, misled.held_out) == (result.setting, result.held_out)


def test_of_equally_accurate_heads_the_surer_one_is_taken() -> None:
    features = clouds(140)
    easy = Features(
        features.store * 0 + np.eye(7, dtype=np.float32)[features.y], features.rows, features.y, features.classes
    )
    result = evaluate_probe(fit_linear, easy, easy, grid((0.01, 0.3), (0.0,)), Training(0, CPU, 60, 32))
    assert set(result.held_out.values()) == {1.0}
    assert result.setting == Setting(0.3, 0.0)
