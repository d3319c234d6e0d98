from __future__ import annotations

import numpy as np
import torch

from mapet.probes.attentive import fit_attentive
from mapet.probes.features import Features
from mapet.probes.heads import Training, evaluate_probe, grid
from mapet.probes.linear import fit_linear

CPU = torch.device("cpu")


def needles(count: int, seed: int) -> Features:
    """Of 12 patches one, anywhere, is marked and says the class; the others say another class each."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, count)
    said = rng.integers(0, 4, (count, 12))
    marked = rng.integers(0, 12, count)
    said[np.arange(count), marked] = y
    x = np.concatenate([np.eye(4)[said], np.zeros((count, 12, 4))], axis=2)
    x[np.arange(count), marked, 4:] = 1
    return Features((x + 0.1 * rng.normal(size=x.shape)).astype(np.float16), np.arange(count), y, tuple("abcd"))


def pooled(features: Features) -> Features:
    return Features(features.x.astype(np.float32).mean(1), features.rows, features.y, features.classes)


def test_it_attends_to_the_patch_that_matters() -> None:
    train, test = needles(800, 0), needles(400, 1)
    training = Training(seed=0, device=CPU, steps=200, batch_size=32)
    attentive = evaluate_probe(fit_attentive, train, test, grid((1e-2, 3e-2), (0.01,)), training)
    linear = evaluate_probe(fit_linear, pooled(train), pooled(test), grid((0.3,), (1e-3,)), training)
    assert attentive.scores.accuracy > 0.95
    assert linear.scores.accuracy < 0.6


def test_wide_patches_have_several_attention_heads_and_random_state_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    features = Features(rng.normal(size=(20, 3, 128)).astype(np.float16), np.arange(20), np.arange(20) % 2, ("a", "b"))
    state = torch.get_rng_state()
    heads = fit_attentive(features, grid((1e-3,), (0.0,)), Training(0, CPU, steps=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert heads.heads[0].pool.num_heads == 2
    assert heads(torch.from_numpy(features.x).float()).shape == (20, 1, 2)
