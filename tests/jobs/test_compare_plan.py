from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file, save_file
from tests.conftest import TINY

from mapet import MapetError
from mapet.config.recipes import RECIPES, load_recipe
from mapet.jobs.compare import plan as compare_plan
from mapet.jobs.compare.cells import Cell
from mapet.jobs.compare.config import CompareConfig
from mapet.jobs.compare.costs import hash_teacher
from mapet.jobs.compare.plan import TRIAL_SEED, Plan, make_plan
from mapet.jobs.tokenizer.fit import fit_tokenizer
from mapet.models.released import RELEASED

SHARED = {**TINY, "steps": 40}
DECODER = {"objective_args": {"decoder_depth": 1, "decoder_dim": 16, "decoder_heads": 2}}


def planned(folder: Path, root: Path = Path("out"), shared: dict[str, Any] = SHARED, **values: Any) -> Plan:
    config = CompareConfig(data=str(folder), **{"seeds": 1, "budget": ["steps"], **values})
    return make_plan(config, {**shared, "data": str(folder)}, root)


def cells(folder: Path, root: Path = Path("out"), shared: dict[str, Any] = SHARED, **values: Any) -> list[Cell]:
    return planned(folder, root, shared, **values).cells({})


def test_every_arm_gets_every_tokenizer_and_seed_and_the_rest_is_the_same(digits: Path) -> None:
    found = cells(digits, objectives=["mapet", "mim", "mae", "random"], arms={"mae": DECODER}, seeds=2)
    assert [(cell.name, cell.seed) for cell in found] == [
        ("mapet, pixels", 0),
        ("mim, pixels", 0),
        ("mae", 0),
        ("random", 0),
        ("mapet, pixels", 1),
        ("mim, pixels", 1),
        ("mae", 1),
        ("random", 1),
    ]
    assert len({cell.root for cell in found}) == 8
    differing = ("objective", "objective_args", "tokenizer", "steps", "seed", "vocab_size")
    rest = [{key: value for key, value in cell.values.items() if key not in differing} for cell in found]
    assert all(values == rest[0] for values in rest)
    mapet, mim, mae, _ = found[:4]
    assert mapet.values["tokenizer"] == mim.values["tokenizer"] != found[4].values["tokenizer"]
    assert mapet.fit == mim.fit
    assert "tokenizer" not in mae.values


def test_what_an_objective_has_of_its_own_makes_it_no_arm_where_objectives_do_not_name_it(
    digits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        found = cells(
            digits, objectives=["mapet", "mim"], arms={"mae": DECODER, "plain": {"objective": "mae", **DECODER}}
        )
    assert {cell.arm for cell in found} == {"mapet", "mim", "plain"}
    assert "objective 'mae' is not named in objectives" in caplog.text
    assert {cell.arm for cell in cells(digits, objectives=[], arms={"mim": {}, "mae": DECODER})} == {"mim", "mae"}


def test_equal_flops_are_equal_and_cells_that_budgets_share_are_trained_once(digits: Path) -> None:
    found = cells(digits, objectives=["mapet", "mim", "random"], budget=["steps", "flops", "epochs=2", "steps=7"])
    by_name = {name: [cell for cell in found if cell.arm == name] for name in ("mapet", "mim", "random")}
    assert [cell.values["steps"] for cell in by_name["mapet"]] == [40, 14, 7]  # 60 images, 8 at a time
    assert by_name["mapet"][0].budgets == ("steps", "flops")
    assert by_name["random"][0].budgets == ("steps", "flops", "epochs=2", "steps=7")
    equal_steps, equal_flops = by_name["mim"][:2]
    assert equal_steps.values["steps"] == 40
    spent = [cell.flops * cell.values["steps"] for cell in (by_name["mapet"][0], equal_flops)]
    assert spent[0] == pytest.approx(spent[1], rel=0.02)
    # Rows of MaPeT and MIM: 17 + 2 * 12 against 17, and fewer in the last block.
    assert 1.8 < by_name["mapet"][0].flops / equal_steps.flops < 2.6


def test_flops_are_those_of_the_matrices(digits: Path) -> None:
    (cell,) = cells(
        digits, objectives=["mim"], shared={**SHARED, "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
    )
    rows, predicted, width, hidden = 17, 6, 32, 128  # MIM: 6 of 16 patches
    patches = 16 * 49 * width
    attention = rows * width * 2 * width + predicted * width * width + 2 * predicted * rows * width
    rest = predicted * (width * width + 2 * width * hidden + width * 16)
    # Twice a multiplication and an addition, thrice for the backward pass; images need no gradient.
    assert cell.flops == pytest.approx(2 * (3 * (attention + rest) + 2 * patches), rel=0.01)


def test_other_settings_are_other_cells(digits: Path) -> None:
    before, same, other = (
        cells(digits, objectives=["mim"], shared={**SHARED, "lr": lr})[0] for lr in (1e-3, 1e-3, 2e-3)
    )
    assert before.root == same.root != other.root
    spelled = {**SHARED, "lr": "1e-3", "image_size": str(SHARED["image_size"])}  # as YAML and flags may have them
    assert cells(digits, objectives=["mim"], shared=spelled)[0].root == before.root
    assert cells(digits, objectives=["mim"], measures=["linear"])[0].root == before.root


def test_a_tokenizer_fitted_anew_makes_other_cells(digits: Path, tmp_path: Path) -> None:
    def found() -> Path:
        return cells(digits, objectives=["mim"], tokenizers=[str(tmp_path / "tok")], shared=shared)[0].root

    shared = {key: value for key, value in SHARED.items() if key != "vocab_size"}
    roots = []
    for seed in (0, 0, 1):
        fit = {"data": str(digits), "image_size": 28, "patch_size": 7, "channels": 1, "vocab_size": 16, "seed": seed}
        fit_tokenizer(fit, tmp_path / "tok", console=Console(quiet=True))
        roots.append(found())
        shutil.rmtree(tmp_path / "tok")
    assert roots[0] == roots[1] != roots[2]


def test_a_teacher_is_known_by_its_weights_not_by_its_name(digits: Path, tmp_path: Path) -> None:
    def found(folder: Path) -> tuple[Path, str]:
        (cell,) = cells(digits, objectives=["mim"], tokenizers=[str(folder)])
        return cell.root, cell.values["tokenizer"]

    first = shutil.copytree(RELEASED["mapet-micro-fashion-mnist"], tmp_path / "a" / "teacher")
    second = shutil.copytree(first, tmp_path / "b" / "teacher")
    assert found(first) == found(second)
    weights = load_file(second / "model.safetensors")
    save_file({key: value * 2 for key, value in weights.items()}, second / "model.safetensors")
    assert not set(found(first)) & set(found(second))
    shutil.copytree(first, second, dirs_exist_ok=True)
    assert found(first) == found(second)
    config = json.loads((second / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.9]  # in none of its tensors
    (second / "config.json").write_text(json.dumps(config))
    assert not set(found(first)) & set(found(second))


def test_a_teacher_is_read_once_for_all_arms(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[Any, ...]] = []

    def counting(*teacher: Any) -> str:
        read.append(teacher)
        return hash_teacher(*teacher)

    monkeypatch.setattr(compare_plan, "hash_teacher", counting)
    name = "mapet-micro-fashion-mnist"
    other = {"first block": {"objective": "mim", "teacher_stage": 0}}
    found = cells(digits, objectives=["mapet", "mim"], arms=other, tokenizers=[name])
    assert read == [(name, None, None, 28), (name, 0, None, 28)]
    fitted = [cell.values["tokenizer"] for cell in found]
    assert fitted[0] == fitted[1] != fitted[2]


def test_a_cell_stays_the_same_wherever_the_images_lie_and_whoever_loads_them(digits: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(digits, tmp_path / "moved")
    before, after = (
        cells(folder, objectives=["mim"], shared={**SHARED, "workers": workers})[0]
        for folder, workers in ((digits, 0), (moved, 2))
    )
    assert (before.root, before.values["tokenizer"]) == (after.root, after.values["tokenizer"])
    (moved / "class 0" / "0.png").unlink()
    fewer = cells(moved, objectives=["mim"])[0]
    assert fewer.root != after.root
    assert fewer.values["tokenizer"] != after.values["tokenizer"]


def test_a_measure_is_taken_anew_of_other_test_images_or_in_another_way(digits: Path, tmp_path: Path) -> None:
    for part, numbers in (("train", "[0-3]"), ("test", "[45]")):
        for file in digits.glob(f"*/{numbers}.png"):
            copy = tmp_path / part / file.parent.name / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)

    def cell(**knn: Any) -> Cell:
        config = CompareConfig(
            data=str(tmp_path), objectives=("mim",), budget=("steps",), seeds=1, measures=("knn",), knn=knn
        )
        return make_plan(config, {**SHARED, "data": str(tmp_path / "train")}, Path("out")).cells({})[0]

    before = cell(k=(3,))  # a tuple of Python; in files it is a list
    record = json.loads(json.dumps({"knn": before.taken("knn", {"accuracy": 0.5, "sweep": [{"held_out": 0.5}]})}))
    assert before.has_taken("knn", record)
    assert not cell(k=[4]).has_taken("knn", record)
    (tmp_path / "test" / "class 0" / "4.png").unlink()
    after = cell(k=(3,))
    assert after.root == before.root
    assert not after.has_taken("knn", record)


def test_every_arm_tries_the_same_learning_rates_with_a_seed_that_is_not_reported(digits: Path) -> None:
    asked = {
        "objectives": ["mapet", "mim", "random"],
        "budget": ["steps", "flops"],
        "seeds": 2,
        "lrs": [1e-3, 2e-3],
        "measures": ["finetune", "linear", "knn"],
    }
    without_rate = {key: value for key, value in SHARED.items() if key != "lr"}
    plan = planned(digits, shared=without_rate, **asked)
    trials = plan.trials()
    assert [(cell.arm, cell.values["lr"]) for cell in trials] == [
        ("mapet", 1e-3),
        ("mapet", 2e-3),
        ("mim", 1e-3),
        ("mim", 2e-3),
    ]
    assert {(cell.seed, cell.values["seed"], cell.values["steps"]) for cell in trials} == {(TRIAL_SEED, TRIAL_SEED, 40)}
    assert all(list(cell.measures) == ["linear"] for cell in trials)
    assert trials[1].title == "mapet, pixels, learning rate 0.002 on trial"

    found = plan.cells({"mapet, pixels": 1e-3, "mim, pixels": 2e-3})
    assert {(cell.arm, cell.values.get("lr")) for cell in found} == {("mapet", 1e-3), ("mim", 2e-3), ("random", None)}
    assert not {cell.root for cell in found} & {cell.root for cell in trials}
    # With one rate for all the cells are those of a comparison without a choice.
    assert {
        cell.root
        for cell in cells(digits, shared={**SHARED, "lr": 1e-3}, **{**asked, "lrs": []})
        if cell.arm == "mapet"
    } == {cell.root for cell in found if cell.arm == "mapet"}
    assert {cell.arm for cell in plan.cells({"mim, pixels": 2e-3})} == {"mim", "random"}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lrs": [1e-3, 2e-3], "measures": ["finetune"]}, "add knn, linear or attentive"),
        ({"lrs": [1e-3, 0.001]}, "0.001 is named twice"),
        ({"lrs": [-1.0, 1.0]}, "greater than 0"),
        ({"lrs": [1e-3]}, "a single rate leaves no choice"),
        ({"lrs": 1e-3}, "a single rate leaves no choice"),
    ],
)
def test_rates_that_cannot_be_chosen_from(digits: Path, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        CompareConfig(data=str(digits), **values)


def test_tokenizers_are_fitted_on_the_crops_that_are_trained_on(digits: Path) -> None:
    for crop_min, fitted in ((None, 0.2), (0.5, 0.5), (1, None)):
        (cell,) = cells(digits, objectives=["mim"], shared={**SHARED, "crop_min": crop_min})
        assert cell.fit is not None
        assert cell.fit["crop_min"] == fitted


def test_names_that_a_table_cannot_show_are_refused(digits: Path) -> None:
    for arms in ({"a\nb": {"objective": "mim"}}, {"": {"objective": "mim"}}):
        with pytest.raises(ValidationError):
            CompareConfig(data=str(digits), arms=arms)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"objectives": ["mapett"]}, "arm 'mapett' has the unknown objective 'mapett'; did you mean 'mapet'"),
        (
            {"objectives": ["mapet"], "arms": {"half": {"objective": "mapet", "context_tokens": 99}}},
            "arm 'half' cannot work: context_tokens is 99",
        ),
        ({"arms": {"long": {"objective": "mim", "steps": 3}}}, "arm 'long' has its own 'steps'"),
        ({"arms": {"odd": {"objective": "mim", "learning": 3}}}, "arm 'odd' has the unknown key 'learning'"),
        ({"objectives": ["random"]}, "no arm is trained"),
        (
            {"arms": {"fast": {"objective": "mim", "lr": 0.1}}, "lrs": [1e-3, 2e-3]},
            "arm 'fast' has its own 'lr', but lrs",
        ),
        (
            {"objectives": ["mim", "mae"], "arms": {"mae": {"tokenizer": "pixels", **DECODER}}},
            "objective 'mae' needs none",
        ),
        (
            {"objectives": ["mim"], "measures": ["knn"], "knn": {"neighbours": 3}},
            "knn of the comparison has the unknown key 'neighbours'",
        ),
        (
            {"objectives": ["mim"], "measures": ["knn"], "knn": {"model": "vit_tiny_patch16_224"}},
            "knn of the comparison has 'model', which is that of each cell",
        ),
        ({"objectives": ["mim"], "tokenizers": ["k-pixels"]}, "'k-pixels'; did you mean 'pixels'"),
        ({"objectives": ["mim"], "tokenizers": ["none/such"]}, "tokenizer folder 'none/such' does not exist"),
        ({"arms": {"odd": {"objective": ["mim"]}}}, "arm 'odd' is wrong: objective = "),
        ({"arms": {"odd": {"objective": "mim", "tokenizer": 5}}}, "arm 'odd' is wrong: tokenizer = 5"),
        (
            {"objectives": ["mim", "random"], "arms": {"random": {"tokenizer": "pixels"}}},
            "objective 'random' needs none",
        ),
        ({"objectives": ["mim"], "budget": ["flops=1"]}, "1 flops are less than an optimiser step of 'mim, pixels'"),
        ({"objectives": ["mim"], "budget": ["flops=9e29"]}, "arm 'mim' is wrong: steps = "),
        (
            {"objectives": ["mim"], "arms": {"mim, pixels": {"objective": "simmim"}}},
            "two arms are called 'mim, pixels'",
        ),
        (
            {"arms": {"a b": {"objective": "mim"}, "a_b": {"objective": "mim"}}},
            "'a b, pixels' and 'a_b, pixels' are the same training",
        ),
        (
            {
                "objectives": ["mim"],
                "tokenizers": ["mapet-micro-fashion-mnist"],
                "shared": {**SHARED, "teacher_size": 5},
            },
            "cannot read images of 5 x 5 pixels",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    digits: Path, values: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(MapetError, match=sentence):
        cells(digits, **values)


def test_damaged_times_are_named(digits: Path, tmp_path: Path) -> None:
    for content in ("{", "[]", '{"a": "b"}'):
        (tmp_path / "times.json").write_text(content)
        with pytest.raises(MapetError, match=r"times.json is damaged"):
            cells(digits, tmp_path, objectives=["mim"], budget=["minutes=0.05"])


def test_minutes_are_measured_once(digits: Path, tmp_path: Path) -> None:
    first = cells(digits, tmp_path, objectives=["mim"], budget=["minutes=0.05"])
    assert (tmp_path / "times.json").exists()
    again = cells(digits, tmp_path, objectives=["mim"], budget=["minutes=0.05"])
    assert [cell.root for cell in again] == [cell.root for cell in first]
    double = cells(digits, tmp_path, objectives=["mim"], budget=["minutes=0.1"])
    assert double[0].values["steps"] == pytest.approx(2 * first[0].values["steps"], abs=1)


@pytest.mark.parametrize(
    "path",
    sorted(RECIPES.glob("**/compare*.yaml")) + sorted(RECIPES.glob("ablations/*.yaml")),
    ids=lambda path: path.stem,
)
def test_a_plan_can_be_made_of_the_recipes(path: Path, digits: Path) -> None:
    name = path.relative_to(RECIPES).with_suffix("").as_posix()
    assert re.match(f"# mapet compare ([a-z]+ )?--config {name} --out ", path.read_text())
    values = {**load_recipe(name), "vocab_size": 16}
    own = {key: values.pop(key) for key in CompareConfig.model_fields if key in values}
    shared = {key: value for key, value in values.items() if key not in ("objective", "tokenizer")}
    for arm in own.get("arms", {}).values():
        arm.pop("vocab_size", None)  # the digits have patches for 16
    config = CompareConfig(**{**own, "data": str(digits)})
    plan = make_plan(config, {**shared, "batch_size": 8, "data": str(digits)}, Path("out"))
    found = plan.cells({variant.name: 1e-3 for variant in plan.compared})
    assert len(found) >= 3 * len(config.differing)
