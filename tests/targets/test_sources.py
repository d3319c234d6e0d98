import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mapet.report.progress import Baseline
from mapet.targets.baseline import measure_baseline
from mapet.targets.sources import NoSource, OnlineIds, TeacherFeatures
from mapet.tokenizers.kmeans_tokenizers import KPixels
from mapet.tokenizers.teachers import build_teacher

VIEWS: Any = {"tokenizer_images": torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))}
CPU = torch.device("cpu")


def test_features_are_those_of_the_teacher_on_the_students_grid() -> None:
    teacher = build_teacher("mapet-micro-fashion-mnist", 1)
    source = TeacherFeatures(teacher, 28, (3, 3), seed=3)
    (found,) = source(VIEWS)
    feature_map = F.interpolate(teacher(VIEWS["tokenizer_images"]), (3, 3), mode="bilinear", antialias=True)
    assert torch.equal(found, feature_map.flatten(2).mT)
    assert (source.width, source.view_size, source.view_seed) == (found.shape[-1], 28, 3)
    assert not found.requires_grad


def test_the_hash_of_a_teacher_depends_on_weights_stage_and_size() -> None:
    def content_hash(stage: int = 1, size: int = 28, change: float = 0.0) -> str:
        teacher = build_teacher("mapet-micro-fashion-mnist", stage)
        next(teacher.parameters()).add_(change)
        return TeacherFeatures(teacher, size, (4, 4), seed=0).content_hash

    hashes = [content_hash(), content_hash(stage=0), content_hash(size=56), content_hash(change=0.1)]
    assert len(set(hashes)) == 4
    assert content_hash() == hashes[0]


def test_ids_are_those_of_the_tokenizer() -> None:
    tokenizer = KPixels(28, 7, 1, vocab_size=8)
    tokenizer.fit(tokenizer.features(VIEWS["tokenizer_images"]).flatten(0, 1), seed=0)
    source = OnlineIds(tokenizer, CPU, seed=0)
    assert torch.equal(source(VIEWS)[0], tokenizer.encode(VIEWS["tokenizer_images"]))
    assert (source.width, source.content_hash) == (8, tokenizer.content_hash)


def test_pixels_need_no_source() -> None:
    source = NoSource(seed=5)
    assert source(VIEWS) == ()
    assert (source.width, source.view_size, source.view_seed) == (0, 0, 5)


def test_baseline_of_ids_is_measured_once(tmp_path: Path) -> None:
    file, ids = tmp_path / "baseline.json", [torch.tensor([[0, 0, 1]]), torch.tensor([[0, 3, 1]])]
    found = measure_baseline(ids, 4, "loss", file)
    entropy = -sum(share * math.log(share) for share in (1 / 2, 1 / 3, 1 / 6))
    assert found == Baseline("accuracy", 0.5, pytest.approx(entropy), "loss")
    assert json.loads(file.read_text())["metric"] == "accuracy"
    assert measure_baseline([], 4, "loss", file) == found
    file.write_text("{")
    assert measure_baseline(ids, 4, "loss", file) == found


def test_baseline_of_features_is_the_best_constant_prediction(tmp_path: Path) -> None:
    features = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0)) + 1
    found = measure_baseline(features.split(1), None, "loss", tmp_path / "baseline.json")
    directions = F.normalize(features.flatten(0, 1), dim=-1)
    constant = directions.mean(0)
    assert found.level == pytest.approx(F.cosine_similarity(directions, constant[None]).mean().item(), abs=1e-5)
    assert (found.metric, found.entropy) == ("cosine", None)
