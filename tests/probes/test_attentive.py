import numpy as np
import torch

from mapet.probes.attentive import fit_attentive
from mapet.probes.features import Features
from mapet.probes.heads import Training, evaluate_probe, grid
from mapet.probes.linear import fit_linear

CPU = torch.device("cpu")


def marked_patches(count: int, seed: int) -> Features:
    """Each of 12 patches shows a class; the true class is that of the one patch that is marked."""
    rng = np.random.default_rng(seed)
    y, classes, marked = rng.integers(0, 4, count), rng.integers(0, 4, (count, 12)), rng.integers(0, 12, count)
    classes[np.arange(count), marked] = y
    x = np.concatenate([np.eye(4)[classes], np.zeros((count, 12, 4))], axis=2)
    x[np.arange(count), marked, 4:] = 1
    return Features((x + 0.1 * rng.normal(size=x.shape)).astype(np.float16), np.arange(count), y, tuple("abcd"))


def mean_over_patches(features: Features) -> Features:
    return Features(features.x.astype(np.float32).mean(1), features.rows, features.y, features.classes)


def test_attends_to_the_marked_patch() -> None:
    train, test = marked_patches(800, 0), marked_patches(400, 1)
    training = Training(seed=0, device=CPU, steps=200, batch_size=32)
    attentive = evaluate_probe(fit_attentive, train, test, grid((1e-2, 3e-2), (0.01,)), training)
    pooled = [mean_over_patches(part) for part in (train, test)]
    linear = evaluate_probe(fit_linear, *pooled, grid((0.3,), (1e-3,)), training)
    assert attentive.scores.accuracy > 0.95
    assert linear.scores.accuracy < 0.6


def test_attention_heads_are_64_wide_and_global_random_state_is_kept() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3, 128)).astype(np.float16)
    state = torch.get_rng_state()
    features = Features(x, np.arange(20), np.arange(20) % 2, ("a", "b"))
    heads = fit_attentive(features, grid((1e-3,), (0.0,)), Training(0, CPU, steps=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert heads.heads[0][1].num_heads == 2
    assert heads(torch.from_numpy(x).float()).shape == (20, 1, 2)
