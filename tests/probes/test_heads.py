from dataclasses import replace

import numpy as np
import pytest
import torch

from mapet.probes.attentive import fit_attentive
from mapet.probes.features import Features
from mapet.probes.heads import Fit, Setting, Training, evaluate_probe, grid
from mapet.probes.linear import fit_linear

CPU = torch.device("cpu")


def clouds(count: int, patches: int | None = None, seed: int = 0, noise: float = 1) -> Features:
    y = np.arange(count) % 7
    x = np.eye(7)[y] * 2 + noise * np.random.default_rng(seed).normal(size=(count, 7))
    x = x.astype(np.float32) if patches is None else np.repeat(x[:, None], patches, axis=1).astype(np.float16)
    return Features(x, np.arange(count), y, tuple("abcdefg"))


def test_a_pass_shows_every_image_once_in_random_order() -> None:
    features = clouds(70)
    batches = list(Training(seed=1, device=CPU, steps=4, batch_size=35).batches(features))
    assert len(batches) == 4
    for half in (0, 2):
        shown = torch.cat([batches[half][0], batches[half + 1][0]])
        assert sorted(shown[:, 0].tolist()) == sorted(features.x[:, 0].tolist())
    assert not torch.equal(batches[0][0], batches[2][0])


def test_default_number_of_steps() -> None:
    assert [Training(0, CPU).steps_for(n) for n in (100, 512_000)] == [2000, 10_000]
    bounded = Training(0, CPU, batch_size=256, most_passes=300)
    assert [bounded.steps_for(n) for n in (2, 40, 256, 512, 100_000)] == [300, 300, 300, 600, 3906]
    assert replace(bounded, steps=7).steps_for(40) == 7


@pytest.mark.parametrize(("fit", "patches"), [(fit_linear, None), (fit_attentive, 3)])
def test_setting_is_chosen_on_held_out_images_and_depends_on_the_seed(fit: Fit, patches: int | None) -> None:
    train, test = clouds(140, patches), clouds(70, patches, seed=1)
    settings = grid((1e-9, 1e-2), (0.0, 0.01))
    shown: list[int] = []
    training = Training(0, CPU, steps=60, batch_size=32, show=shown.append)
    result = evaluate_probe(fit, train, test, settings, training)
    assert shown == list(range(1, 121)), "both trainings take the same number of steps"
    assert result.setting.lr == 1e-2
    assert result.held_out[result.setting] == max(result.held_out.values()) > result.held_out[settings[0]]
    assert result.scores.accuracy > 0.6
    wrong_test = evaluate_probe(fit, train, replace(test, y=(test.y + 1) % 7), settings, training)
    assert (wrong_test.setting, wrong_test.held_out) == (result.setting, result.held_out)
    other_seed = evaluate_probe(fit, train, test, settings, replace(training, seed=1))
    assert other_seed.held_out != result.held_out


def test_of_equally_accurate_heads_that_with_the_lower_loss_is_chosen() -> None:
    easy = clouds(140, noise=0)
    result = evaluate_probe(fit_linear, easy, easy, grid((0.01, 0.3), (0.0,)), Training(0, CPU, 60, 32))
    assert set(result.held_out.values()) == {1.0}
    assert result.setting == Setting(0.3, 0.0)
