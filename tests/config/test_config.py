from pathlib import Path
from typing import Any

import pytest
import yaml

from mapet import MapetError
from mapet.cli import VERBS, load_verb
from mapet.config.base import Config, Measured, config_to_yaml, continued, marked, override, parse, read_recipe, settle
from mapet.config.keys import TrainKeys
from mapet.jobs.evaluate.config import KNNConfig, LinearConfig
from mapet.jobs.finetune.config import FinetuneConfig
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.tokenizer.config import FitConfig

# Facts of a run of MaPeT on ids.
PUBLISHED = {"targets": "ids", "masking": "random", "mask_ratio": 0.75}
FACTS: dict[str, Any] = {"published": PUBLISHED, "patch_size": 16, "vocab_size": 8192, "view": {}}


def settle_pretraining(images: int = 95, processes: int = 1, facts: Any = FACTS, **given: Any) -> PretrainConfig:
    return settle(PretrainConfig, {"data": "x", **given}, images=images, processes=processes, **facts)


def settle_finetuning(images: int, processes: int = 1, **given: Any) -> FinetuneConfig:
    return settle(FinetuneConfig, {"model": "m", "data": "d", **given}, images=images, processes=processes)


@pytest.mark.parametrize(
    ("config_class", "values", "says"),
    [
        (PretrainConfig, {"batchsize": 3}, "the configuration has the unknown key 'batchsize'; did you mean 'batch_si"),
        (PretrainConfig, {"lr": "fast"}, r"lr = fast.*valid number"),
        (PretrainConfig, {"data": "dat\udcff"}, "not valid UTF-8; rename it"),
        (PretrainConfig, {"crop_min": 0}, "crop_min = 0.*greater than 0"),
        (PretrainConfig, {"precision": "int8"}, "precision = int8.*bf16"),
        (PretrainConfig, {"std": [0.0]}, "std must be positive"),
        (PretrainConfig, {"init": ""}, "init = '': string should have"),
        (KNNConfig, {"image_size": [14]}, r"image_size = \(?\[?14.*required"),
        (PretrainConfig, {"model_args": {"img_size": 30}}, "img_size has a flag of its own: use --image-size"),
        (PretrainConfig, {"steps": 3, "epochs": 3}, "give epochs or steps, not both"),
        (PretrainConfig, {"mirror": True}, "mirror needs views"),
        (PretrainConfig, {"value_range": [5, 5]}, "value_range = .*write two numbers, the lower one first"),
        (PretrainConfig, {"value_range": [-3e38, 3e38]}, "write two numbers"),
        (PretrainConfig, {"max_pixels": 10**9}, "max_pixels = .*less than or equal to 178956970"),
        (FitConfig, {"teacher_size": 64}, "teacher_size is given, but there is no teacher"),
        (FinetuneConfig, {"augment": "randaugment"}, "none of timm's policies"),
    ],
)
def test_parse_refuses_wrong_values(config_class: type[Config], values: dict[str, Any], says: str) -> None:
    with pytest.raises(MapetError, match=says):
        parse(config_class, values)


def test_none_is_not_given_unless_it_is_a_value_of_the_key() -> None:
    values = {"data": None, "lr": None, "precision": "auto", "views": None}
    assert parse(PretrainConfig, values) == {"views": None}
    with pytest.raises(MapetError, match="lacks 'data': a folder of images"):
        parse(PretrainConfig, values, complete=True)


@pytest.mark.parametrize(
    ("config_class", "key", "text", "expected"),
    [
        (PretrainConfig, "lr", "1e-3", 1e-3),
        (PretrainConfig, "flip", "0.1", 0.1),
        (PretrainConfig, "contrast", "true", True),
        (PretrainConfig, "channels", "1", 1),
        (PretrainConfig, "precision", False, "no"),  # a bare no in YAML
        (PretrainConfig, "mean", ["0.5", "0.4", "1e-1"], (0.5, 0.4, 0.1)),
        (PretrainConfig, "model_args", {"a": "false", "b": "4", "c": "1e-1"}, {"a": False, "b": 4, "c": 0.1}),
        (PretrainConfig, "mean", ["data"], Measured.DATA),
        (PretrainConfig, "value_range", "data", Measured.DATA),
        (PretrainConfig, "value_range", ["-1000", "3e3"], (-1000.0, 3000.0)),
        (FinetuneConfig, "image_size", "192x256", (192, 256)),
        (FinetuneConfig, "image_size", "192", (192, 192)),
        (LinearConfig, "lr", ["0.1", "1e-3"], (0.1, 1e-3)),
    ],
)
def test_texts_of_flags_become_values(config_class: type[Config], key: str, text: object, expected: object) -> None:
    given = parse(config_class, {key: text})
    assert given == {key: expected}
    assert type(given[key]) is type(expected)


@pytest.mark.parametrize(
    ("config_class", "key", "most", "too_much"),
    [
        (PretrainConfig, "image_size", 4096, 7000),
        (PretrainConfig, "steps", 10**9, 10**12),
        (PretrainConfig, "lr", 1e3, 1e300),
        (PretrainConfig, "model_args", {"depth": 2**14}, {"depth": 10**9}),
        (FinetuneConfig, "image_size", (4096, 4096), (7000, 224)),
        (LinearConfig, "seeds", 100, 10**9),
    ],
)
def test_absurd_sizes_are_refused(config_class: type[Config], key: str, most: object, too_much: object) -> None:
    assert parse(config_class, {key: most}) == {key: most}
    with pytest.raises(MapetError, match=f"{key}.*(less than|take at most)"):
        parse(config_class, {key: too_much})


def test_settle_derives_what_is_not_given() -> None:
    config = settle_pretraining(batch_size=10)
    assert (config.epochs, config.steps, config.checkpoint_every, config.eval_every) == (300, 2700, 9, 10)
    assert (config.targets, config.masking, config.mask_ratio, config.patch_size) == ("ids", "random", 0.75, 16)
    assert (config.tokenizer, config.vocab_size, config.crop_min) == ("pixels", 8192, 0.2)
    assert (config.mean, config.std, config.precision) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "no")
    four = settle_pretraining(channels=4, std=(1, 2, 3, 4))
    assert (four.mean, four.std) == (Measured.DATA, (1, 2, 3, 4))
    assert settle_pretraining(mean="data").std is Measured.DATA
    assert yaml.safe_load(yaml.safe_dump(parse(PretrainConfig, {"mean": ["data"]}))) == {"mean": "data"}
    stored = settle_pretraining(tokens="t", facts={**FACTS, "view": {"crop_min": 0.5, "views": 4}})
    assert (stored.tokenizer, stored.crop_min, stored.views) == (None, 0.5, 4)
    pixels = settle_pretraining(targets="pixels", channels=1, steps=7, mask_ratio=0.5)
    assert (pixels.tokenizer, pixels.vocab_size, pixels.mean) == (None, None, (0.449,))
    assert (pixels.epochs, pixels.steps, pixels.mask_ratio) == (None, 7, 0.5)
    tuned = settle_finetuning(600)
    assert (tuned.batch_size, tuned.epochs, tuned.steps, tuned.eval_every) == (32, 100, 1800, 10)
    with pytest.raises(MapetError, match=r"mean has 1 values for 3 channel\(s\)"):
        settle_pretraining(mean=[0.5])


@pytest.mark.parametrize(
    ("accumulate", "processes", "images", "pretraining", "finetuning"),
    [(1, 1, 60_000, 256, 512), (1, 1, 60, 4, 4), (1, 1, 2, 2, 2), (2, 3, 60_000, 252, 504), (3, 2, 100, 6, 12)],
)
def test_default_batch_size(accumulate: int, processes: int, images: int, pretraining: int, finetuning: int) -> None:
    assert settle_pretraining(images, processes, accumulate=accumulate).batch_size == pretraining
    assert settle_finetuning(images, processes, accumulate=accumulate).batch_size == finetuning


@pytest.mark.parametrize(
    ("config_class", "given", "images", "processes", "says"),
    [
        (TrainKeys, {"batch_size": 21}, 20, 1, "batch size 21 is larger than the data set of 20 images; pass --batch-"),
        (TrainKeys, {"batch_size": 21}, 50, 2, "21 cannot be divided among 2 processes .*take a multiple of 2"),
        (TrainKeys, {"accumulate": 4}, 7, 2, "7 images are too few to be shared out among 2 processes with 4 micro"),
        (FinetuneConfig, {"batch_size": 21, "model": "m"}, 50, 1, "21 at a time is odd; take --batch-size 22"),
    ],
)
def test_batches_that_cannot_be_shared_out_are_refused(
    config_class: type[Config], given: dict[str, Any], images: int, processes: int, says: str
) -> None:
    with pytest.raises(MapetError, match=says):
        settle(config_class, {"data": "x", **given}, images=images, processes=processes)


def test_default_learning_rate() -> None:
    """It grows with the square root of the batch size, from 32 images on."""
    rates = {size: settle_pretraining(4096, batch_size=size).lr for size in (2, 32, 512, 2048)}
    assert rates == pytest.approx({2: 1.875e-4, 32: 1.875e-4, 512: 0.75e-3, 2048: 1.5e-3})
    rates = {size: settle_finetuning(4096, batch_size=size).lr for size in (2, 32, 512)}
    assert rates == pytest.approx({2: 1.25e-4, 32: 1.25e-4, 512: 5e-4})
    assert settle_pretraining(lr=0.1).lr == 0.1


def test_a_resumed_run_may_change_free_keys_only(tmp_path: Path) -> None:
    began_with = settle_pretraining(batch_size=10, model_args={"depth": 2}, layer_scale=None, lr=1e-5)
    saved = yaml.safe_load(config_to_yaml(began_with))
    assert continued(PretrainConfig, saved, {}, tmp_path) == began_with
    free = {"data": "y", "workers": 1, "checkpoint_every": 2, "log_every": 3, "eval_every": 4, "max_damaged": 0.5}
    free |= {"accumulate": 2, "keep": 3, "max_pixels": 10**6, "max_bytes": 10**6}
    assert marked(PretrainConfig, "free") == {*free, "eval_data"}
    same = {"lr": "1e-5", "layer_scale": None, "mask_ratio": None, "init": None}
    assert continued(PretrainConfig, saved, {**free, **same}, tmp_path) == began_with.but(**free)
    with pytest.raises(MapetError, match=f"'lr' is 0.1, but the run in {tmp_path} began with 1e-05; .*another --out"):
        continued(PretrainConfig, saved, {"lr": 0.1}, tmp_path)


@pytest.mark.parametrize(
    ("change", "dropped", "says"),
    [
        ({"lr": "fast"}, "", "config.yaml is wrong: lr = fast"),
        ({}, "lr", "config.yaml lacks 'lr', so it was cut short or edited; restore it"),
        ({"strange": 1}, "", "config.yaml has the unknown key 'strange'"),
        ({"strange": 1}, "lr", "holds the run of another command or version: its configuration has 'strange'"),
    ],
)
def test_damaged_and_foreign_configurations_are_refused(
    change: dict[str, Any], dropped: str, says: str, tmp_path: Path
) -> None:
    saved = {**yaml.safe_load(config_to_yaml(settle_finetuning(100))), **change}
    saved.pop(dropped, None)
    with pytest.raises(MapetError, match=says):
        continued(FinetuneConfig, saved, {}, tmp_path)


def test_a_key_given_anew_drops_the_key_that_it_replaces() -> None:
    before = {"steps": 3, "lr": 0.1}
    assert override(before, {"lr": 0.2}, PretrainConfig) == {"steps": 3, "lr": 0.2}
    assert override(before, {"epochs": 2}, PretrainConfig) == {"lr": 0.1, "epochs": 2}
    assert override({"steps": 3, "lrs": [0.1, 0.2]}, {"lr": 0.1}, PretrainConfig) == {"steps": 3, "lr": 0.1}
    configs = load_verb("compare").configs
    assert override(before, {"lrs": [0.1, 0.2]}, *configs) == {"steps": 3, "lrs": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "does not exist"), ("- a\n", "must hold 'key: value' lines, but it is a list"), ("a: [1,", "not valid YA")],
)
def test_recipes_that_cannot_be_read_are_refused(content: str | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(MapetError, match=says):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("name", VERBS)
def test_every_key_has_a_text(name: str) -> None:
    for config_class in load_verb(name).configs:
        assert [key for key, field in config_class.model_fields.items() if not field.description] == []
