from collections.abc import Callable
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
from mapet.data.labelled import few_per_class, open_labelled
from mapet.data.views import PlainView
from mapet.jobs.evaluate.config import LinearConfig
from mapet.probes.features import Features, extract_features
from mapet.probes.heads import Setting, Training, evaluate_probe, grid, predict
from mapet.probes.linear import fit_linear, principal

VIEW = PlainView((28, 28), (0.286,), (0.353,))
CPU = torch.device("cpu")
Parts = tuple[Features, Features]


def measure(read: Any, train: int | None, test: int | None, data: str = "mnist") -> Parts:
    parts = [
        part if count is None else few_per_class(part, count, seed=0)
        for part, count in zip(open_labelled(data), (train, test), strict=True)
    ]
    with torch.no_grad():
        found = [extract_features(read, part, VIEW, 1, device=CPU) for part in parts]
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixels", "vit"])
def test_accuracy_equals_that_of_scikit_learn_on_all_of_fashion_mnist(kind: str, tiny_vit: Callable[..., Any]) -> None:
    network = nn.Flatten() if kind == "pixels" else tiny_vit(channels=1, embed_dim=128, depth=4).eval()
    train, test = measure(network, None, None, "fashion-mnist")
    defaults = settle(LinearConfig, {"model": "m", "data": "d"})
    settings = grid(defaults.lr, defaults.weight_decay)
    result = evaluate_probe(fit_linear, train, test, settings, Training(seed=0, device=CPU))
    assert abs(result.scores.accuracy - reference(train, test, result.setting.weight_decay)[0]) <= 0.01
