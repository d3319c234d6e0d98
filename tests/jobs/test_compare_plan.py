import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from tests.conftest import TINY

from mapet import MapetError
from mapet.config.recipes import RECIPES, load_recipe
from mapet.jobs.compare.cells import Cell
from mapet.jobs.compare.config import CompareConfig
from mapet.jobs.compare.plan import TRIAL_SEED, Plan, make_plan
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.tokenizer.fit import fit_tokenizer
from mapet.models.networks import RELEASED

SHARED = {**TINY, "steps": 40}
DECODER = {"objective_args": {"decoder_depth": 1, "decoder_dim": 16, "decoder_heads": 2}}


def plan(folder: Path, **values: Any) -> Plan:
    """Plan a comparison; None stands for a key that is not given."""
    asked = {"seeds": 1, "budget": ["steps"], **SHARED, "data": str(folder), **values}
    return make_plan({key: value for key, value in asked.items() if value is not None}, Path("out"))


def cells(folder: Path, **values: Any) -> list[Cell]:
    return plan(folder, **values).cells({})


def root(folder: Path, **values: Any) -> Path:
    return cells(folder, **{"objectives": ["mim"], **values})[0].root


def test_every_arm_gets_every_tokenizer_and_seed_and_shares_the_rest(digits: Path) -> None:
    found = cells(
        digits,
        objectives=["mapet", "mim", "mae", "random"],
        tokenizers=["pixels", "mapet-micro-fashion-mnist"],
        arms={"mae": DECODER},
        seeds=2,
    )
    labels = [f"{name}, {tokenizer}" for name in ("mapet", "mim") for tokenizer in ("pixels", *RELEASED)]
    labels += ["mae", "random"]
    assert [(cell.arm.label, cell.seed) for cell in found] == [(label, seed) for seed in (0, 1) for label in labels]
    assert len({cell.root for cell in found}) == 12
    differing = ("objective", "objective_args", "targets", "tokenizer", "steps", "seed")
    rest = [{key: value for key, value in cell.values.items() if key not in differing} for cell in found]
    assert all(values == rest[0] for values in rest[:5])
    mapet, features, mim, *_, mae, _ = found[:6]
    assert mapet.values["tokenizer"] == mim.values["tokenizer"] != found[6].values["tokenizer"]
    assert mapet.values["tokenizer"] != features.values["tokenizer"]
    assert mapet.fit == mim.fit
    assert mae.fit is None


@pytest.mark.parametrize(("crop_min", "fitted"), [(None, 0.2), (0.5, 0.5), (1, None)])
def test_tokenizers_are_fitted_as_the_arms_are_trained(crop_min: Any, fitted: Any, digits: Path) -> None:
    (cell,) = cells(digits, objectives=["mim"], crop_min=crop_min, contrast=False)
    assert cell.fit is not None
    sizes = {key: SHARED[key] for key in ("image_size", "patch_size", "channels", "vocab_size")}
    expected = {**sizes, "teacher": "pixels", "seed": 0, "contrast": False, "crop_min": fitted, "data": str(digits)}
    assert {key: cell.fit[key] for key in expected} == expected
    assert not {"vocab_size", "contrast"} & cell.values.keys()


def test_arms_may_be_objectives_with_keys_of_their_own_or_differ_in_targets(digits: Path) -> None:
    arms: dict[str, Any] = {"mae": DECODER, "plain": {"objective": "mae", **DECODER}}
    found = cells(digits, objectives=["mim"], arms=arms)
    assert {cell.arm.name for cell in found} == {"mim", "plain"}, "mae is not among the objectives"
    assert {cell.arm.name for cell in cells(digits, objectives=[], arms={"mim": {}, "mae": DECODER})} == {"mim", "mae"}
    teacher = {"objective": "mim", "targets": "features", "teacher": "mapet-micro-fashion-mnist", "teacher_stage": 1}
    arms = {"pixels": {"objective": "mim", "targets": "pixels"}, "features": teacher, "ids": {"objective": "mim"}}
    labels = [(cell.arm.label, cell.fit is None) for cell in cells(digits, objectives=[], arms=arms)]
    assert labels == [("pixels", True), ("features", True), ("ids, pixels", False)]


def test_budgets_buy_steps_and_a_cell_that_budgets_share_is_trained_once(digits: Path) -> None:
    found = cells(digits, objectives=["mapet", "mim", "random"], budget=["steps", "flops", "epochs=2", "steps=7"])
    by_name = {name: [cell for cell in found if cell.arm.name == name] for name in ("mapet", "mim", "random")}
    assert [cell.values["steps"] for cell in by_name["mapet"]] == [40, 14, 7]  # 60 images, 8 at a time
    assert by_name["mapet"][0].budgets == ("steps", "flops")
    assert by_name["random"][0].budgets == ("steps", "flops", "epochs=2", "steps=7")
    assert by_name["random"][0].arm.flops == 0
    equal_steps, equal_flops = by_name["mim"][:2]
    assert equal_steps.values["steps"] == 40
    spent = [cell.arm.flops * cell.values["steps"] for cell in (by_name["mapet"][0], equal_flops)]
    assert spent[0] == pytest.approx(spent[1], rel=0.02)
    # Rows of MaPeT and MIM: 17 + 2 * 12 against 17, and fewer in the last block.
    assert 1.8 < by_name["mapet"][0].arm.flops / equal_steps.arm.flops < 2.6


def test_flops_are_those_of_the_matrices(digits: Path) -> None:
    (cell,) = cells(digits, objectives=["mim"], model_args={"embed_dim": 32, "depth": 1, "num_heads": 2})
    rows, predicted, width, hidden = 17, 6, 32, 128  # MIM: 6 of 16 patches
    patches = 16 * 49 * width
    attention = rows * width * 2 * width + predicted * width * width + 2 * predicted * rows * width
    rest = predicted * (width * width + 2 * width * hidden + width * 16)
    # Two for a multiplication and an addition; three for forward and backward, but images need no gradient.
    assert cell.arm.flops == pytest.approx(2 * (3 * (attention + rest) + 2 * patches), rel=0.01)


def test_a_cell_is_identified_by_what_decides_its_outcome(digits: Path, tmp_path: Path) -> None:
    before = root(digits)
    assert root(digits, lr="1e-3", image_size="28") == before, "as flags and YAML may write it"
    assert root(digits, measures=["linear"]) == before
    moved = shutil.copytree(digits, tmp_path / "moved")
    assert root(moved, workers=2) == before
    assert root(digits, lr=2e-3) != before
    assert root(digits, tokenizers=["mapet-micro-fashion-mnist"]) != before
    (moved / "class 0" / "0.png").unlink()
    assert root(moved) != before


def test_a_fitted_tokenizer_and_a_teacher_are_known_by_their_content(digits: Path, tmp_path: Path) -> None:
    def with_tokenizer(name: str) -> Path:
        return root(digits, tokenizers=[str(tmp_path / name)], vocab_size=None)

    for name, seed in (("first", 0), ("other", 1)):
        fit = {"data": str(digits), "image_size": 28, "patch_size": 7, "channels": 1, "vocab_size": 16, "seed": seed}
        fit_tokenizer(fit, tmp_path / name, console=Console(quiet=True))
    before, other = with_tokenizer("first"), with_tokenizer("other")
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "other").rename(tmp_path / "first")
    assert before.name.rpartition("-")[2] != other.name.rpartition("-")[2]
    assert with_tokenizer("first").name.rpartition("-")[2] == other.name.rpartition("-")[2]

    teacher = shutil.copytree(RELEASED["mapet-micro-fashion-mnist"], tmp_path / "teacher")
    roots = [root(digits, tokenizers=[str(teacher)])]
    (weights,) = teacher.glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights)
    roots.append(root(digits, tokenizers=[str(teacher)]))
    assert roots[0] != roots[1]


def test_measures_with_other_keys_or_test_images_have_other_folders(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "train")
    shutil.copytree(digits, tmp_path / "test")

    def knn(**keys: Any) -> tuple[Path, str]:
        (cell,) = cells(tmp_path, objectives=["mim"], measures=["knn"], knn=keys)
        return cell.root, cell.measures[0].folder

    before = knn(k=(3,))
    assert knn(k=["3"], workers=3) == before
    assert knn(k=[4])[1] != before[1]
    (tmp_path / "test" / "class 0" / "4.png").unlink()
    assert knn(k=[3])[0] == before[0]
    assert knn(k=[3])[1] != before[1]


def test_every_arm_tries_the_same_learning_rates_with_a_seed_that_is_not_reported(digits: Path) -> None:
    measures = ["finetune", "linear", "knn"]
    asked = {"objectives": ["mapet", "mim", "random"], "budget": ["steps", "flops"], "seeds": 2, "measures": measures}
    found = plan(digits, lr=None, lrs=[1e-3, 2e-3], **asked)
    trials = found.trials()
    rates = [("mapet", 1e-3), ("mapet", 2e-3), ("mim", 1e-3), ("mim", 2e-3)]
    assert [(cell.arm.name, cell.values["lr"]) for cell in trials] == rates
    assert {(cell.values["seed"], cell.values["steps"]) for cell in trials} == {(TRIAL_SEED, 40)}
    assert all([measure.kind for measure in cell.measures] == ["linear"] for cell in trials)

    tables = found.cells({"mapet, pixels": 1e-3, "mim, pixels": 2e-3})
    assert {(cell.arm.name, cell.values["lr"]) for cell in tables if cell.arm.is_trained} == {rates[0], rates[3]}
    assert {cell.arm.name for cell in found.cells({"mim, pixels": 2e-3})} == {"mim", "random"}
    # With one rate for all, the cells are those of a comparison without a choice.
    without = {cell.root for cell in cells(digits, lr=1e-3, **asked) if cell.arm.name == "mapet"}
    assert {cell.root for cell in tables if cell.arm.name == "mapet"} == without


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"tokens": "store"}, "a comparison has no key 'tokens'"),
        ({"measure": ["knn"]}, "no key 'measure'; did you mean 'measures'"),
        ({"budget": ["minutes=3"]}, "'minutes=3' is no budget; take epochs, steps or flops"),
        ({"budget": ["epochs=0.5"]}, "'epochs=0.5' is no budget"),
        ({"lrs": [1e-3, 2e-3]}, "lr and lrs are both given"),
        ({"lr": None, "lrs": [1e-3]}, r"lrs = \[0.001\]: tuple should have at least 2 items"),
        ({"lr": None, "lrs": [1e-3, 2e-3], "measures": ["finetune"]}, "add knn, linear or attentive"),
        ({"objectives": []}, "neither objectives nor arms"),
        ({"objectives": ["mapett"]}, "arm 'mapett' cannot work: unknown objective 'mapett'; did you mean 'mapet'"),
        ({"arms": {"half": {"objective": "mapet", "mask_ratio": 0.01}}}, "arm 'half' cannot work: mask_ratio 0.01"),
        ({"arms": {"half": {"objective": "mapet", "context_tokens": 5}}}, "arm 'half' .* unknown key 'context_tokens'"),
        ({"arms": {"long": {"objective": "mim", "steps": 3}}}, "arm 'long' has its own 'steps'"),
        ({"objectives": ["random"]}, "no arm is trained"),
        ({"lr": None, "lrs": [1, 2], "arms": {"fast": {"lr": 0.1}}}, "arm 'fast' has its own 'lr'"),
        ({"objectives": ["mim", "random"], "arms": {"random": {"tokenizer": "pixels"}}}, "leave out tokenizer"),
        ({"knn": {"neighbours": 3}}, "knn of the comparison has the unknown key 'neighbours'"),
        ({"knn": {"model": "vit_tiny_patch16_224"}}, "knn of the comparison has 'model', which the comparison sets"),
        ({"tokenizers": ["k-pixels"]}, "'k-pixels'; did you mean 'pixels'"),
        ({"tokenizers": ["none/such"]}, "tokenizer folder 'none/such' does not exist"),
        ({"tokenizers": ["mapet-micro-fashion-mnist"], "teacher_size": 5}, "cannot read images of 5 x 5 pixels"),
        ({"budget": ["flops=1"]}, "1 FLOPs are less than an optimiser step of 'mim, pixels'"),
        ({"arms": {"mim, pixels": {"objective": "simmim"}}}, "two arms are called 'mim, pixels'"),
    ],
)
def test_a_comparison_that_cannot_work_is_refused(values: dict[str, Any], sentence: str, digits: Path) -> None:
    with pytest.raises(MapetError, match=sentence):
        plan(digits, **{"objectives": ["mim"], "measures": ["knn"], **values})


@pytest.mark.parametrize("pattern", ["compare*.yaml", "ablations/*.yaml"])
def test_the_recipes_can_be_planned(pattern: str, digits: Path) -> None:
    for path in sorted(RECIPES.glob(pattern)):
        name = path.relative_to(RECIPES).with_suffix("").as_posix()
        assert re.match(f"# mapet compare ([a-z]+ )?--config {name} --out ", path.read_text())
        values = load_recipe(name, CompareConfig, PretrainConfig)
        for arm in values.get("arms", {}).values():
            arm.pop("vocab_size", None)  # there are too few digits for large codebooks
        found = make_plan({**values, "vocab_size": 16, "batch_size": 8, "data": str(digits)}, Path("out"))
        assert len(found.cells(dict.fromkeys(found.steps, 1e-3))) >= 3 * len(found.arms)
