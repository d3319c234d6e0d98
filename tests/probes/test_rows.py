from collections.abc import Callable
from typing import Any

from torch import nn

from mapet.data.open import few_per_class, open_labelled
from mapet.data.reading import Reading
from mapet.data.views import PlainView
from mapet.probes.rows import probe_evaluator, probe_row

VIEW = PlainView((28, 28), (0.13,), (0.31,))


def test_row_of_raw_pixels_and_evaluator_of_a_network(tiny_vit: Callable[..., Any]) -> None:
    parts = [few_per_class(part, count, seed=0) for part, count in zip(open_labelled("mnist"), (50, 20), strict=True)]
    pixels = probe_row(nn.Flatten(), *parts, VIEW, reading=Reading(1))
    assert 0.8 < pixels["knn"] < 1
    assert 0.75 < pixels["linear"] < 1
    network = tiny_vit(channels=1, drop_path=0.5).train()
    evaluator = probe_evaluator(*parts, VIEW, reading=Reading(1))
    found = dict(evaluator(network))
    assert set(found) == {"eval_knn", "eval_linear"}
    assert found == dict(evaluator(network)), "stochastic depth must be off"
    assert network.training
    assert 0.1 < found["eval_knn"] < pixels["knn"]
    fewer_than_neighbours = probe_row(
        nn.Flatten(), parts[0].subset(range(0, 500, 80)), parts[1], VIEW, reading=Reading(1)
    )
    assert all(0 <= accuracy <= 1 for accuracy in fewer_than_neighbours.values())
