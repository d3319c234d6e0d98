from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from mapet import MapetError
from mapet.config.base import StrictConfig, config_to_yaml, free_keys, make_config, override, read_recipe
from mapet.jobs.evaluate.config import LinearConfig
from mapet.jobs.finetune.config import FinetuneConfig
from mapet.jobs.infer.config import EmbedConfig
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.segment.config import SegmentConfig
from mapet.jobs.tokenizer.config import FitConfig, VQKDConfig


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(MapetError, match=r"unknown key 'batchsize'; did you mean 'batch_size'"):
        make_config(PretrainConfig, {"data": "x", "batchsize": 3})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "lacks 'data'"),
        ({"data": "x", "lr": "fast"}, r"lr = 'fast'.*valid number"),
        ({"data": "x", "lr": math.inf}, "lr = inf"),
        ({"data": "x", "crop_min": 0}, "crop_min = 0.*greater than 0"),
        ({"data": "x", "precision": "int8"}, "precision = 'int8'.*bf16"),
        ({"data": "x", "steps": 3, "epochs": 3}, "give epochs or steps, not both"),
        ({"data": "x", "batch_size": 10, "accumulate": 3}, "batch_size 10 is not divisible by accumulate 3"),
        ({"data": "x", "mean": [0.5]}, r"mean has 1 values for 3 channel\(s\)"),
        ({"data": "x", "channels": 1, "std": [0.0]}, "std must be positive"),
        ({"data": "x", "teacher_size": 64}, "teacher_size is given, but there is no teacher"),
        ({"data": ""}, "data = ''"),
        ({"data": "x", "seed": 2**64}, "seed = 18446744073709551616"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(MapetError, match=says):
        make_config(PretrainConfig, values)


@pytest.mark.parametrize(
    ("config_class", "key", "most", "too_much"),
    [
        (PretrainConfig, "image_size", 4096, 7000),
        (PretrainConfig, "batch_size", 65536, 10_000_000),
        (PretrainConfig, "epochs", 1_000_000, 10**12),
        (PretrainConfig, "steps", 10**9, 10**12),
        (PretrainConfig, "lr", 1e3, 1e300),
        (PretrainConfig, "weight_decay", 1e3, 1e300),
        (PretrainConfig, "vocab_size", 2**20, 10**9),
        (PretrainConfig, "sample_gib", 2**20, 1e308),
        (PretrainConfig, "model_args", {"depth": 2**14}, {"depth": 10**9}),
        (FinetuneConfig, "image_size", (4096, 4096), (7000, 224)),
        (FinetuneConfig, "lr", 1e3, 1e300),
        (FinetuneConfig, "batch_size", 65536, 10_000_000),
        (SegmentConfig, "lr", 1e3, 1e300),
        (SegmentConfig, "short_side", 2**14, 100_000),
        (SegmentConfig, "batch_size", 65536, 10_000_000),
        (LinearConfig, "seeds", 100, 10**9),
        (LinearConfig, "probe_batch", 65536, 10_000_000),
        (EmbedConfig, "batch_size", 65536, 10_000_000),
        (FitConfig, "patch_size", 4096, 100_000),
        (VQKDConfig, "depth", 1000, 10**9),
    ],
)
def test_absurd_sizes_are_refused_and_large_ones_are_not(
    config_class: type[StrictConfig], key: str, most: object, too_much: object
) -> None:
    fields = config_class.model_fields
    needed = {name: "x" for name in ("model", "data", "teacher") if name in fields and fields[name].is_required()}
    if config_class is FitConfig:
        needed["image_size"] = 4096  # type: ignore[assignment]
    assert getattr(make_config(config_class, {**needed, key: most}), key) == most
    with pytest.raises(MapetError, match=f"{key}.*(less than or equal to|take at most)"):
        make_config(config_class, {**needed, key: too_much})


def test_learning_rate_is_the_papers_scaled_by_the_root_of_the_batch() -> None:
    assert make_config(PretrainConfig, {"data": "x", "batch_size": 2048}).peak_lr == pytest.approx(1.5e-3)
    assert make_config(PretrainConfig, {"data": "x", "batch_size": 512}).peak_lr == pytest.approx(0.75e-3)
    assert make_config(PretrainConfig, {"data": "x", "lr": 0.1}).peak_lr == 0.1


def test_resolving_fills_in_what_depends_on_the_data_and_changes_nothing_twice() -> None:
    config = make_config(PretrainConfig, {"data": "x", "batch_size": 10}).resolve(images=95)
    assert (config.epochs, config.checkpoint_every, config.total_steps(95)) == (300, 9, 2700)
    assert config.mean == (0.485, 0.456, 0.406)
    assert config.resolve(images=95) == config
    assert make_config(PretrainConfig, {"data": "x", "steps": 7, "batch_size": 10}).resolve(95).total_steps(95) == 7


def test_a_given_batch_is_not_changed_but_refused() -> None:
    given = {"data": "x", "batch_size": 21}
    with pytest.raises(MapetError, match=r"batch size 21 is larger than the data set of 20 images.*--batch-size 20"):
        make_config(PretrainConfig, given).resolve(images=20)
    says = r"21 cannot be divided among 2 processes with 1 micro-batches each; take a multiple of 2"
    with pytest.raises(MapetError, match=says):
        make_config(PretrainConfig, given).resolve(50, processes=2)
    with pytest.raises(MapetError, match="21 at a time is odd; take --batch-size 22"):
        make_config(FinetuneConfig, {**given, "model": "m"}).resolve(50)
    with pytest.raises(MapetError, match=r"7 images are too few to be shared out among 2 processes with 4 micro"):
        make_config(PretrainConfig, {"data": "x", "accumulate": 4}).resolve(7, processes=2)


@pytest.mark.parametrize(
    ("accumulate", "processes", "images", "pretraining", "finetuning"),
    [
        (1, 1, 60_000, 256, 512),
        (1, 1, 2_559, 128, 128),
        (1, 1, 256, 16, 16),
        (1, 1, 60, 4, 4),
        (1, 1, 2, 2, 2),
        (2, 3, 60_000, 252, 504),
        (1, 4, 60, 4, 8),
        (3, 2, 100, 6, 12),
    ],
)
def test_default_batches_regard_images_processes_and_micro_batches(
    accumulate: int, processes: int, images: int, pretraining: int, finetuning: int
) -> None:
    for config_class, expected in ((PretrainConfig, pretraining), (FinetuneConfig, finetuning)):
        given = {"data": "x", "accumulate": accumulate, **({"model": "m"} if config_class is FinetuneConfig else {})}
        config = make_config(config_class, given).resolve(images, processes)
        assert config.batch_size == expected
        assert config.resolve(images, processes) == config


def test_the_default_rate_does_not_fall_below_that_of_32_images() -> None:
    few, some = (make_config(FinetuneConfig, {"model": "m", "data": "d", "batch_size": size}) for size in (2, 32))
    assert few.peak_lr == some.peak_lr == pytest.approx(1.25e-4)
    few, some = (make_config(PretrainConfig, {"data": "d", "batch_size": size}) for size in (2, 32))
    assert few.peak_lr == some.peak_lr == pytest.approx(1.875e-4)


def test_a_bare_no_in_yaml_is_a_precision() -> None:
    assert make_config(PretrainConfig, {"data": "x", **yaml.safe_load("precision: no")}).precision == "no"


def test_yaml_round_trip() -> None:
    config = make_config(PretrainConfig, {"data": "x", "model_args": {"depth": 2}, "layer_scale": None, "lr": 1e-5})
    assert make_config(PretrainConfig, yaml.safe_load(config_to_yaml(config))) == config


def test_recipes_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MapetError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(MapetError, match="must hold 'key: value' lines, but it is a list"):
        read_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,\n")
    with pytest.raises(MapetError, match="is not valid YAML"):
        read_recipe(tmp_path / "broken.yaml")


def test_every_key_is_described_and_what_is_computed_is_not_free() -> None:
    assert all(field.description for field in PretrainConfig.model_fields.values())
    assert free_keys(PretrainConfig) == {
        "data",
        "workers",
        "checkpoint_every",
        "log_every",
        "eval_data",
        "eval_every",
        "max_damaged",
    }


@pytest.mark.parametrize(
    ("given", "images", "batch_size"), [({}, 60_000, 512), ({}, 600, 32), ({}, 7, 2), ({"batch_size": 512}, 600, 512)]
)
def test_few_labels_are_cut_into_ten_steps(given: dict[str, int], images: int, batch_size: int) -> None:
    config = make_config(FinetuneConfig, {"model": "m", "data": "d", **given}).resolve(images)
    assert config.batch_size == batch_size
    assert config.lr == pytest.approx(5e-4 * (max(32, batch_size) / 512) ** 0.5)
    assert (config.epochs, config.eval_every) == (100, 10)


def test_what_is_said_anew_replaces_also_a_length_in_the_other_unit() -> None:
    before = {"steps": 3, "lr": 0.1}
    assert override(before, {"lr": 0.2}) == {"steps": 3, "lr": 0.2}
    assert override({"steps": 3, "lrs": [0.1, 0.2]}, {"lr": 0.1}) == {"steps": 3, "lr": 0.1}
    assert override(before, {"lrs": [0.1, 0.2]}) == {"steps": 3, "lrs": [0.1, 0.2]}
    assert override(before, {"epochs": 2}) == {"lr": 0.1, "epochs": 2}
    assert override(before, {"steps": 4, "epochs": 2}) == {"lr": 0.1, "steps": 4, "epochs": 2}  # to be refused
