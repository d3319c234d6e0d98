from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from rich.console import Console
from tests.conftest import TINY

from mapet import MapetError, load_tokenizer
from mapet.config.base import make_config, read_recipe
from mapet.config.keys import KMeansKeys
from mapet.config.recipes import find_recipe
from mapet.engine.files import claimed_folder
from mapet.jobs.pretrain.run import pretrain
from mapet.jobs.tokenizer.config import FitConfig
from mapet.jobs.tokenizer.fit import fit_tokenizer, report_on_tokenizer
from mapet.targets.fitting import plan_sample

QUIET = Console(quiet=True)
FIT: dict[str, Any] = {"image_size": 28, "patch_size": 7, "channels": 1, "vocab_size": 16, "workers": 0}


def fit(data: Path, out: Path, **values: Any) -> Any:
    return fit_tokenizer({**FIT, "data": str(data), **values}, out, console=QUIET)


def test_the_sample_is_as_large_as_asked_for_and_memory_allows() -> None:
    def points(**keys: Any) -> int:
        return plan_sample(KMeansKeys(**keys), 100, width=1024, patches=196, images=10_000).points

    assert points(points_per_centroid=512) == pytest.approx(51_200, rel=0.01)
    assert points() == pytest.approx(25_600, rel=0.01)
    assert points(sample_gib=0.01) == pytest.approx(0.01 * 2**30 / 4096, rel=0.03)
    with pytest.raises(MapetError, match=r"0\.0001 GiB hold 26 patches of 1024 numbers, fewer than the 100 ids"):
        points(sample_gib=0.0001)
    with pytest.raises(MapetError, match="codebook of 100 ids needs at least as many patches, .* give only 98"):
        plan_sample(KMeansKeys(), 100, width=8, patches=49, images=2)


def test_few_images_give_all_their_patches_and_many_give_some() -> None:
    few = plan_sample(KMeansKeys(points_per_centroid=512), 100, width=8, patches=196, images=30)
    assert (few.images, few.patches_per_image) == (30, 196)
    many = plan_sample(KMeansKeys(points_per_centroid=512), 100, width=8, patches=196, images=100_000)
    assert many.patches_per_image == 49
    assert many.points >= 51_200


def test_fitting_writes_a_tokenizer_and_a_report(digits: Path, tmp_path: Path) -> None:
    tokenizer, report = fit(digits, tmp_path / "tok", kmeans_restarts=2)
    loaded = load_tokenizer(tmp_path / "tok")
    assert loaded.content_hash == tokenizer.content_hash
    names = {"tokenizer.json", "tokenizer.safetensors", "report.json", "atlas.png", "token_maps.png", "usage.png"}
    assert {path.name for path in (tmp_path / "tok").iterdir()} == names
    assert json.loads((tmp_path / "tok" / "report.json").read_text())["used_codes"] == report.used_codes == 16
    result = pretrain(
        {**TINY, "vocab_size": None, "data": str(digits), "steps": 2, "tokenizer": str(tmp_path / "tok")},
        tmp_path / "run",
        console=QUIET,
    )
    assert result.config.tokenizer == str(tmp_path / "tok")
    assert load_tokenizer(tmp_path / "run").content_hash == tokenizer.content_hash, "a run's folder names its tokenizer"
    with pytest.raises(MapetError, match="is there already and is not empty"):
        fit(digits, tmp_path / "tok")
    with pytest.raises(MapetError, match="is a tokenizer already"):
        fit(digits, tmp_path / "again", teacher=str(tmp_path / "tok"))


def test_processes_fit_the_tokenizer_that_one_fits(digits: Path, tmp_path: Path) -> None:
    fit(digits, tmp_path / "one", batch_size=7)
    recipe = tmp_path / "fit.yaml"
    recipe.write_text(yaml.safe_dump({**FIT, "data": str(digits), "batch_size": 7}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*launcher, "mapet", "tokenizer", "fit", "--config", str(recipe), "--out", str(tmp_path / "two"), "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["used_codes"] == 16
    one, two = (load_tokenizer(tmp_path / name) for name in ("one", "two"))
    assert one.content_hash == two.content_hash


def test_an_own_run_as_teacher_is_needed_no_more_afterwards(digits: Path, tmp_path: Path) -> None:
    run = pretrain({**TINY, "data": str(digits), "steps": 2}, tmp_path / "run", console=QUIET)
    exported = run.folder.exported
    tokenizer, _ = fit(digits, tmp_path / "tok", teacher=str(exported), teacher_stage=0)
    assert tokenizer.centroids.shape == (16, 32)
    views = torch.rand(3, 1, 28, 28)
    ids = tokenizer.encode(views)
    exported.rename(tmp_path / "elsewhere")
    assert torch.equal(load_tokenizer(tmp_path / "tok").encode(views), ids)


def test_bad_input(digits: Path, tmp_path: Path) -> None:
    broken = timm.create_model("test_resnet").state_dict()
    broken["conv1.0.weight"][0] = float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    with pytest.raises(MapetError, match="features of teacher 'test_resnet' contain NaN"):
        fit(digits, tmp_path / "tok", teacher="test_resnet", teacher_weights=str(tmp_path / "nan.pth"), teacher_size=64)
    with pytest.raises(MapetError, match="needs at least as many patches, but the images have only 960"):
        fit(digits, tmp_path / "tok", vocab_size=961)
    with pytest.raises(MapetError, match="not divisible by patch_size 5"):
        fit(digits, tmp_path / "tok", patch_size=5)
    with pytest.raises(MapetError, match="lies inside the image folder"):
        fit(digits, digits / "tok")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(MapetError, match="is there already and is not empty"):
        fit(digits, tmp_path / "full")
    assert not (tmp_path / "tok").exists()


def test_a_codebook_hardly_used_is_warned_of(digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fitted on digits, and then used for other images: blank ones."""
    fit(digits, tmp_path / "tok", contrast=False)
    (tmp_path / "blank").mkdir()
    for grey in range(0, 60, 3):
        Image.new("L", (28, 28), grey).save(tmp_path / "blank" / f"{grey}.png")
    values = {"tokenizer": str(tmp_path / "tok"), "data": str(tmp_path / "blank"), "workers": 0}
    report = report_on_tokenizer(values, tmp_path / "report", console=QUIET)
    assert (tmp_path / "report" / "atlas.png").exists()
    assert f"only {report.used_codes} of 16 codes are used: fit with a smaller --vocab-size" in caplog.text


def test_the_papers_setting_is_a_recipe() -> None:
    config = make_config(FitConfig, {**read_recipe(find_recipe("k-clip")), "data": "x"})
    assert config.teacher == "resnet50x64_clip_gap.openai"
    assert (config.vocab_size, config.teacher_size, config.image_size // config.patch_size) == (8192, 448, 14)
    assert (config.kmeans_iterations, config.kmeans_restarts, config.points_per_centroid) == (20, 5, 512)
    assert (config.spherical, config.crop_min) == (False, None)
    assert plan_sample(config, 8192, 4096, 196, 1_281_167).points >= 8192 * 512


def test_a_teacher_may_see_a_size_that_has_nothing_to_do_with_the_grid(digits: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    weights = str(tmp_path / "weights.pth")
    fit(digits, tmp_path / "tok", teacher="test_resnet", teacher_weights=weights, teacher_size=66)
    assert (tmp_path / "tok" / "atlas.png").exists()


def test_folders_in_use_or_not_to_be_written_are_refused_before_the_work(digits: Path, tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "tok"):
        with pytest.raises(MapetError, match="is being made by another process"):
            fit(digits, tmp_path / "tok")
    fit(digits, tmp_path / "tok")
    (tmp_path / "file").touch()
    with pytest.raises(MapetError, match=r"file/tok cannot be written to"):
        fit(digits, tmp_path / "file" / "tok")
    with pytest.raises(MapetError, match="holds neither a tokenizer nor an exported backbone"):
        fit(digits, tmp_path / "again", teacher=str(digits))
    with pytest.raises(MapetError, match="teacher_stage is given, but there is no teacher"):
        fit(digits, tmp_path / "again", teacher_stage=1)
    with pytest.raises(MapetError, match=r"holds 'atlas\.png', but no run"):
        pretrain({**TINY, "data": str(digits)}, tmp_path / "tok", console=QUIET)


def test_another_precision_after_fitting_in_one_process(digits: Path, tmp_path: Path) -> None:
    fit(digits, tmp_path / "tok")
    values = {**TINY, "vocab_size": None, "data": str(digits), "steps": 2, "tokenizer": str(tmp_path / "tok")}
    for precision in ("bf16", "no"):
        result = pretrain({**values, "precision": precision}, tmp_path / precision, console=QUIET)
        assert result.config.precision == precision
