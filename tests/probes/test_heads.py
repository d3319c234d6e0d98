from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from mapet import MapetError
from mapet.config.base import settle
from mapet.data.open import few_per_class, open_labelled
from mapet.data.reading import Reading
from mapet.data.views import PlainView
from mapet.jobs.evaluate.config import LinearConfig
from mapet.probes.fits import fit_attentive, fit_linear, principal
from mapet.probes.heads import Fit, Setting, Training, default_steps, evaluate_probe, grid, predict
from mapet.probes.labelled import Features, extract_features

VIEW = PlainView((28, 28), (0.286,), (0.353,))
CPU = torch.device("cpu")
Parts = tuple[Features, Features]


def measure(read: Any, train: int | None, test: int | None, data: str = "mnist") -> Parts:
    parts = [
        part if count is None else few_per_class(part, count, seed=0)
        for part, count in zip(open_labelled(data), (train, test), strict=True)
    ]
    with torch.no_grad():
        found = [extract_features(read, part, VIEW, Reading(1), device=CPU) for part in parts]
    return found[0], found[1]


@pytest.fixture(scope="module")
def pixels() -> Parts:
    return measure(lambda images: F.avg_pool2d(images, 4).flatten(1), 200, 100)


def reference(train: Features, test: Features, weight_decay: float) -> tuple[float, LogisticRegression, StandardScaler]:
    """The accuracy in 0..1 of logistic regression by scikit-learn with the same penalty."""
    scaler = StandardScaler().fit(train.x.astype(np.float64))
    model = LogisticRegression(C=1 / (weight_decay * len(train)), max_iter=5000)
    model.fit(scaler.transform(train.x), train.y)
    assert model.n_iter_[0] < 5000
    return model.score(scaler.transform(test.x), test.y), model, scaler


def accuracy_of(setting: Setting, train: Features, test: Features, training: Training) -> float:
    heads = fit_linear(train, [setting], training)
    return float((predict(heads, test, training)[:, 0] == test.y).mean())


@pytest.mark.parametrize(("weight_decay", "apart"), [(1e-3, 0.4), (1e-2, 0.05)])
def test_probe_is_logistic_regression(weight_decay: float, apart: float, pixels: Parts) -> None:
    train, test = pixels
    training = Training(seed=0, device=CPU, steps=1000)
    heads = fit_linear(train, [Setting(0.3, weight_decay)], training)
    expected, model, scaler = reference(*pixels, weight_decay)
    with torch.no_grad():
        logits = heads(torch.from_numpy(test.x))[:, 0].numpy()
    theirs = model.decision_function(scaler.transform(test.x))
    assert (logits.argmax(1) == theirs.argmax(1)).mean() > 0.985
    assert abs((logits.argmax(1) == test.y).mean() - expected) <= 0.01
    # Only differences between classes matter; with a low weight decay the weights converge slowly.
    gap = np.abs((logits - logits.mean(1, keepdims=True)) - (theirs - theirs.mean(1, keepdims=True))).mean()
    assert gap < apart * np.abs(theirs).mean()


def test_directions_of_small_variance_are_learned(tiny_vit: Callable[..., Any]) -> None:
    """The features of an untrained network are nearly the same for all images."""
    train, test = measure(tiny_vit(channels=1).eval(), 300, 100)
    variances = principal(train)[2]
    assert variances[-1] > 1e2 * variances[len(variances) // 4]
    ours = accuracy_of(Setting(0.3, 1e-4), train, test, Training(seed=0, device=CPU, steps=1000))
    assert abs(ours - reference(train, test, 1e-4)[0]) <= 0.01


def test_heads_are_independent_and_divergence_is_refused(pixels: Parts) -> None:
    train, test = pixels
    training = Training(seed=0, device=CPU, steps=100)
    alone = fit_linear(train, [Setting(0.1, 1e-3)], training)
    beside = fit_linear(train, [Setting(1e30, 1e-3), Setting(0.1, 1e-3)], training)
    assert torch.allclose(alone.weight[0], beside.weight[1], atol=1e-5)
    assert not beside.weight[0].isfinite().all()
    result = evaluate_probe(fit_linear, train, test, grid((1e30, 0.1), (1e-3,)), training)
    assert result.setting == Setting(0.1, 1e-3)
    with pytest.raises(MapetError, match=r"diverged at every learning rate \(1e\+30\); pass a lower --lr"):
        evaluate_probe(fit_linear, train, test, [Setting(1e30, 1e-3)], training)


def test_constant_features_are_ignored() -> None:
    y = np.arange(90) % 3
    noise = 0.1 * np.random.default_rng(0).normal(size=(90, 3))
    x = np.concatenate([np.eye(3)[y] + noise, np.full((90, 2), 7e3)], 1).astype(np.float32)
    features = Features(x, np.arange(90), y, ("a", "b", "c"))
    assert accuracy_of(Setting(0.3, 1e-3), features, features, Training(0, CPU, steps=50)) == 1.0


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
    assert [default_steps(n, 512) for n in (100, 512_000)] == [2000, 10_000]
    assert [default_steps(n, 256, 300) for n in (2, 40, 256, 512, 100_000)] == [300, 300, 300, 600, 3906]


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixels", "vit"])
def test_accuracy_equals_that_of_scikit_learn_on_all_of_fashion_mnist(kind: str, tiny_vit: Callable[..., Any]) -> None:
    network = nn.Flatten() if kind == "pixels" else tiny_vit(channels=1, embed_dim=128, depth=4).eval()
    train, test = measure(network, None, None, "fashion-mnist")
    defaults = settle(LinearConfig, {"model": "m", "data": "d"})
    settings = grid(defaults.lr, defaults.weight_decay)
    training = Training(seed=0, device=CPU, steps=default_steps(len(train), 512))
    result = evaluate_probe(fit_linear, train, test, settings, training)
    assert abs(result.scores.accuracy - reference(train, test, result.setting.weight_decay)[0]) <= 0.01
