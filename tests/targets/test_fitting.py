import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from tests.conftest import QUIET, pretrain_tiny, under_torchrun

from mapet import MapetError, load_tokenizer
from mapet.config.base import read_recipe, settle
from mapet.config.keys import KMeansKeys
from mapet.config.recipes import find_recipe
from mapet.engine.files import claimed_folder
from mapet.jobs.tokenizer.config import FitConfig
from mapet.jobs.tokenizer.fit import fit_tokenizer, report_on_tokenizer
from mapet.targets.fitting import plan_sample

FIT: dict[str, Any] = {"image_size": 28, "patch_size": 7, "channels": 1, "vocab_size": 16, "workers": 0}


def fit(data: Path, out: Path, **values: Any) -> Any:
    return fit_tokenizer({**FIT, "data": str(data), **values}, out, console=QUIET)


def test_size_of_the_sample() -> None:
    def points(**keys: Any) -> int:
        return plan_sample(KMeansKeys(**keys), 100, width=1024, patches=196, images=10_000).points

    assert points(points_per_centroid=512) == pytest.approx(51_200, rel=0.01)
    assert points() == pytest.approx(25_600, rel=0.01)
    assert points(sample_gib=0.01) == pytest.approx(0.01 * 2**30 / 4096, rel=0.03)
    few = plan_sample(KMeansKeys(points_per_centroid=512), 100, width=8, patches=196, images=30)
    assert (few.images, few.patches_per_image) == (30, 196)
    many = plan_sample(KMeansKeys(points_per_centroid=512), 100, width=8, patches=196, images=100_000)
    assert many.patches_per_image == 49
    assert many.points >= 51_200
    with pytest.raises(MapetError, match=r"needs at least as many patches, but only 0 patches .* in 0\.0001 GiB"):
        points(sample_gib=0.0001)
    with pytest.raises(MapetError, match="codebook of 100 ids .* only 98 patches .* from 2 images"):
        plan_sample(KMeansKeys(), 100, width=8, patches=49, images=2)


def test_a_fitted_tokenizer_is_used_for_pretraining(digits: Path, tmp_path: Path) -> None:
    tokenizer, report = fit(digits, tmp_path / "tok", kmeans_restarts=2)
    names = {"tokenizer.json", "tokenizer.safetensors", "report.json", "atlas.png", "token_maps.png", "usage.png"}
    assert {path.name for path in (tmp_path / "tok").iterdir()} == names
    assert json.loads((tmp_path / "tok" / "report.json").read_text())["used_codes"] == report.used_codes == 16
    values: dict[str, Any] = {"vocab_size": None, "steps": 2, "tokenizer": str(tmp_path / "tok")}
    for precision in ("bf16", "no"):
        pretrain_tiny(digits, tmp_path / precision, **values, precision=precision)
        assert load_tokenizer(tmp_path / precision).content_hash == tokenizer.content_hash


def test_several_processes_fit_the_same_tokenizer(digits: Path, tmp_path: Path) -> None:
    fit(digits, tmp_path / "one", batch_size=7)
    flags = [
        f"--{key.replace('_', '-')}={value}" for key, value in {**FIT, "batch_size": 7, "out": tmp_path / "two"}.items()
    ]
    command = [sys.executable, "-m", "mapet", "tokenizer", "fit", str(digits), *flags, "--json"]
    done = subprocess.run(under_torchrun(command), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["used_codes"] == 16
    one, two = (load_tokenizer(tmp_path / name) for name in ("one", "two"))
    assert one.content_hash == two.content_hash


def test_the_teacher_is_saved_with_the_tokenizer(pretrained_run: Path, digits: Path, tmp_path: Path) -> None:
    exported = (pretrained_run / "exported").rename(tmp_path / "exported")
    tokenizer, _ = fit(digits, tmp_path / "tok", teacher=str(exported), teacher_stage=0)
    views = torch.rand(3, 1, 28, 28)
    ids = tokenizer.encode(views)
    exported.rename(pretrained_run / "exported")
    assert torch.equal(load_tokenizer(tmp_path / "tok").encode(views), ids)


def test_a_teacher_may_read_another_size_than_the_grid_divides(digits: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    weights = str(tmp_path / "weights.pth")
    fit(digits, tmp_path / "tok", teacher="test_resnet", teacher_weights=weights, teacher_size=66)
    assert (tmp_path / "tok" / "atlas.png").exists()


def test_a_codebook_that_is_hardly_used_is_reported(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(digits, tmp_path / "tok", contrast=False)
    (tmp_path / "blank").mkdir()
    for grey in range(0, 60, 3):
        Image.new("L", (28, 28), grey).save(tmp_path / "blank" / f"{grey}.png")
    values = {"tokenizer": str(tmp_path / "tok"), "data": str(tmp_path / "blank"), "workers": 0}
    report = report_on_tokenizer(values, tmp_path / "report", console=QUIET)
    assert (tmp_path / "report" / "atlas.png").exists()
    assert f"only {report.used_codes} of 16 codes are used: fit with a smaller --vocab-size" in caplog.text


def test_the_papers_setting_is_a_recipe() -> None:
    config = settle(FitConfig, {**read_recipe(find_recipe("k-clip")), "data": "x"})
    assert config.teacher == "resnet50x64_clip_gap.openai"
    assert (config.vocab_size, config.teacher_size, config.image_size // config.patch_size) == (8192, 448, 14)
    assert (config.kmeans_iterations, config.kmeans_restarts, config.points_per_centroid) == (20, 5, 512)
    assert plan_sample(config, 8192, 4096, 196, 1_281_167).points >= 8192 * 512


def test_wrong_input_is_refused_before_anything_is_written(digits: Path, tmp_path: Path) -> None:
    broken = timm.create_model("test_resnet").state_dict()
    broken["conv1.0.weight"][0] = float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    (tmp_path / "full" / "tokenizer.json").mkdir(parents=True)
    nan = {"teacher": "test_resnet", "teacher_weights": str(tmp_path / "nan.pth"), "teacher_size": 64}
    for values, message in (
        (nan, "features of teacher 'test_resnet' contain NaN"),
        ({"vocab_size": 961}, "needs at least as many patches, but the images have only 960"),
        ({"patch_size": 5}, "not divisible by patch_size 5"),
        ({"teacher": str(digits)}, "holds neither a tokenizer nor an exported backbone"),
        ({"teacher_stage": 1}, "teacher_stage is given, but there is no teacher"),
        ({"teacher": "vqkd"}, "is a tokenizer already"),
    ):
        with pytest.raises(MapetError, match=message):
            fit(digits, tmp_path / "tok", **values)
    for out, message in (
        (digits / "tok", "lies inside the image folder"),
        (tmp_path / "full", "is there already and is not empty"),
        (tmp_path / "nan.pth" / "tok", "cannot be written to"),
    ):
        with pytest.raises(MapetError, match=message):
            fit(digits, out)
    with claimed_folder(tmp_path / "tok"), pytest.raises(MapetError, match="is in use by another process"):
        fit(digits, tmp_path / "tok")
    assert not (tmp_path / "tok").exists()
