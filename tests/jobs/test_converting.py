from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor

import mapet
from mapet import MapetError
from mapet.jobs.convert.run import convert


def test_a_converted_classifier_gives_the_authors_logits(oracle: Callable[..., Any], tmp_path: Path) -> None:
    recorded = oracle("finetuned")
    torch.save({"state_dict": recorded.state_dict, "epoch": 300}, tmp_path / "finetuned.tar")
    result = convert({"file": str(tmp_path / "finetuned.tar"), "num_heads": 3}, tmp_path / "out")
    assert result == {
        "architecture": "vit_base_patch16_224",
        "num_heads": 3,
        "num_heads_assumed": False,
        "image_size": 64,
        "channels": 3,
        "classes": 10,
        "parameters": sum(tensor.numel() for tensor in recorded.state_dict.values()),
    }
    model, transform = mapet.load(tmp_path / "out")
    images = recorded.tensors["images"]
    assert (model(images) - recorded.tensors["logits"]).abs().max() < 1e-5
    assert (model.forward_features(images) - recorded.tensors["features"]).abs().max() < 1e-5
    assert (transform.view.mean, transform.view.crop_pct) == ((0.485, 0.456, 0.406), 0.9)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    with pytest.raises(MapetError, match="is there already and is not empty"):
        convert({"file": str(tmp_path / "finetuned.tar"), "num_heads": 3}, tmp_path / "out")


def test_the_network_of_a_pretraining_checkpoint_is_converted(oracle: Callable[..., Any], tmp_path: Path) -> None:
    recorded, file = oracle("pretrain"), str(tmp_path / "pretrain.tar")
    torch.save({"state_dict": recorded.state_dict, "optimizer": {"state": {}}}, file)
    assert convert({"file": file, "num_heads": 3}, tmp_path / "out")["classes"] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    # With mask vector and head, which load_upstream also returns, it gives the recorded logits.
    context, tensors = recorded.config["context_tokens"], recorded.tensors
    objective = mapet.load_upstream(file, {"num_heads": 3, "context_tokens": context}).eval()
    converted = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    torch.nn.init.zeros_(objective.backbone.pos_embed)
    objective.backbone.load_state_dict(converted.state_dict())
    order = tensors["order"][:, 1:] - 1  # the authors' orders begin with the class token
    prediction = objective.predict(tensors["images"], mapet.Mask.split(order, objective.targets))
    assert (prediction - tensors["logits"]).abs().max() < 1e-5


def test_published_classifiers_get_timms_name_and_the_classes_of_imagenet(tmp_path: Path) -> None:
    network = timm.create_model("vit_tiny_patch16_224", global_pool="avg", fc_norm=True, init_values=0.1)
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        if ".attn.qkv." in name:
            state[name.replace("qkv", "q")], state[name.replace("qkv", "kv")] = tensor.split([192, 384])
        else:
            state[name] = tensor
    torch.save({"state_dict": state, "epoch": 300, "arch": "vit_tiny"}, tmp_path / "t.tar")
    result = convert({"file": str(tmp_path / "t.tar")}, tmp_path / "out")
    assert (result["architecture"], result["classes"], result["image_size"]) == ("vit_tiny_patch16_224", 1000, 224)
    assert (result["num_heads"], result["num_heads_assumed"]) == (3, True)
    loaded = mapet.load(tmp_path / "out")
    assert loaded.classes == tuple(ImageNetInfo().label_names())
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(loaded.model(images), network.eval()(images))


def test_nothing_is_written_for_a_file_that_does_not_fit(oracle: Callable[..., Any], tmp_path: Path) -> None:
    state = oracle("finetuned").state_dict
    torch.save({**state, "norm.bias": torch.full((48,), torch.nan)}, tmp_path / "file.pth")
    with pytest.raises(MapetError, match=r"'norm.bias' in .*file.pth does not hold finite floats"):
        convert({"file": str(tmp_path / "file.pth"), "num_heads": 3}, tmp_path / "out")
    with pytest.raises(MapetError, match="the name of the output folder is empty"):
        convert({"file": str(tmp_path / "file.pth")}, "")
    assert {path.name for path in tmp_path.iterdir()} == {"file.pth"}
