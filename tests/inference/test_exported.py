from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mapet import MapetError
from mapet.inference.models import open_model
from mapet.models.export import export_network


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("pretrained_cfg.mean", [0.1, 0.2], r"mean has 2 values, but images of 1 channel\(s\) are read"),
        ("pretrained_cfg.std", [0.1, 0.2, 0.3], "std has 3 values"),
        ("pretrained_cfg.std", [0.0], r"pretrained_cfg.std.0 = 0.0: input should be greater than 0"),
        ("pretrained_cfg.std", [-1.0], "pretrained_cfg.std.0 = -1.0"),
        ("pretrained_cfg.mean", [float("nan")], "pretrained_cfg.mean.0 = nan"),
        ("pretrained_cfg.mean", "0.1", "pretrained_cfg.mean = '0.1'"),
        ("pretrained_cfg.crop_pct", 0, "pretrained_cfg.crop_pct = 0"),
        ("pretrained_cfg.crop_pct", 1.5, "pretrained_cfg.crop_pct = 1.5"),
        ("pretrained_cfg.interpolation", "cubic-ish", "pretrained_cfg.interpolation = 'cubic-ish'"),
        ("pretrained_cfg.crop_mode", "round", "pretrained_cfg.crop_mode = 'round'"),
        ("pretrained_cfg.input_size", [1, 28], "pretrained_cfg.input_size = "),
        ("pretrained_cfg.input_size", [1, -28, 28], "pretrained_cfg.input_size.1 = -28"),
        ("pretrained_cfg.input_size", [1, "28", 28], "pretrained_cfg.input_size.1 = '28'"),
        ("pretrained_cfg.num_classes", 5, "num_classes is 4 but .*pretrained_cfg.num_classes is 5"),
        ("num_classes", 7, "num_classes is 7 but model_args.num_classes is 4"),
        ("num_classes", -1, "num_classes = -1"),
        ("num_classes", "4", "num_classes = '4'"),
        ("label_names", "abcd", "label_names = 'abcd'"),
        ("label_names", ["a", "b", "a", "c"], "label_names names a class twice"),
        ("label_names", ["a", "b"], "label_names has 2 names, but num_classes is 4"),
        ("label_names", ["a", "b", "c", 4], "label_names.3 = 4"),
        ("model_args.in_chans", 0, "model_args.in_chans = 0"),
        ("pretrained_cfg", 3, "pretrained_cfg = 3"),
        ("architecture", "", "architecture = ''"),
    ],
)
def test_what_was_edited_is_named(key: str, value: Any, says: str, classifier: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(classifier, tmp_path / "model"))
    content = json.loads((folder / "config.json").read_text())
    *above, last = key.split(".")
    part = content
    for name in above:
        part = part[name]
    part[last] = value
    (folder / "config.json").write_text(json.dumps(content))
    for source in (folder, f"local-dir:{folder}"):
        with pytest.raises(
            MapetError, match=rf"model/config.json is wrong: .*{says}.*; restore it or export the model"
        ):
            open_model(source)


def test_other_networks_exports_and_timms_older_files_are_read(tmp_path: Path) -> None:
    network = timm.create_model("resnet10t", num_classes=2)
    export_network(network, tmp_path, (0.5,) * 3, (0.2,) * 3)
    assert open_model(tmp_path).view.size == (176, 176)
    content = json.loads((tmp_path / "config.json").read_text())
    flat = {**content["pretrained_cfg"], "architecture": content["architecture"], "num_features": 512}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert open_model(tmp_path, classifier=True).classes == ("0", "1")
    content["pretrained_cfg"]["input_size"] = [3, 1, 1_000_000_000_000]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(MapetError, match="cannot take images of 1 x 1000000000000 pixels"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "says"), [(torch.complex64, "C64"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.int64, "I64")]
)
def test_weights_that_would_be_converted_in_silence(
    dtype: torch.dtype, says: str, classifier: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(classifier, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    for kept in (torch.float16, torch.float64):
        save_file({**weights, "norm.bias": weights["norm.bias"].to(kept)}, folder / "model.safetensors")
        open_model(folder)
    save_file({**weights, "norm.bias": weights["norm.bias"].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(MapetError, match=rf"model.safetensors holds 'norm.bias' as {says}, not as one of F64, F32"):
        open_model(folder)
    open_model(folder, reinit=True)
