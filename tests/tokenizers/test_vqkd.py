import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mapet import MapetError, load_tokenizer
from mapet.tokenizers.files import save_tokenizer
from mapet.tokenizers.vqkd import VQKD

DEPTH, WIDTH, PATCH, SIDE, CODES, CODE_DIM = 2, 128, 4, 3, 50, 8


def transformer(prefix: str, depth: int, channels: int, patch: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a ViT in upstream's ``beit2/modeling_finetune.py``."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, SIDE**2 + 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, channels, patch, patch),
        "patch_embed.proj.bias": (WIDTH,),
    }
    for block in range(depth):
        vectors = {f"{name}.{part}" for name in ("norm1", "norm2") for part in ("weight", "bias")}
        vectors |= {"attn.q_bias", "attn.v_bias", "attn.proj.bias", "mlp.fc2.bias"}
        shapes |= {f"blocks.{block}.{name}": (WIDTH,) for name in sorted(vectors)} | {
            f"blocks.{block}.attn.qkv.weight": (3 * WIDTH, WIDTH),
            f"blocks.{block}.attn.proj.weight": (WIDTH, WIDTH),
            f"blocks.{block}.mlp.fc1.weight": (4 * WIDTH, WIDTH),
            f"blocks.{block}.mlp.fc1.bias": (4 * WIDTH,),
            f"blocks.{block}.mlp.fc2.weight": (WIDTH, 4 * WIDTH),
        }
    shapes |= {"fc_norm.weight": (WIDTH,), "fc_norm.bias": (WIDTH,)}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def published_state() -> dict[str, torch.Tensor]:
    """Small tensors with all names of upstream's ``beit2/modeling_vqkd.py`` and ``norm_ema_quantizer.py``."""
    shapes = {
        **transformer("encoder", DEPTH, 3, PATCH),
        **transformer("decoder", 1, CODE_DIM, 1),
        "quantize.cluster_size": (CODES,),
        "quantize.embedding.weight": (CODES, CODE_DIM),
        "quantize.embedding.cluster_size": (CODES,),
        "quantize.embedding.embed_avg": (CODES, CODE_DIM),
        "quantize.embedding.initted": (1,),
        "scaling_layer.shift": (1, 3, 1, 1),
        "scaling_layer.scale": (1, 3, 1, 1),
        "teacher_model.visual.proj": (WIDTH, 512),
    }
    for part, width in (("encode", CODE_DIM), ("decode", 512)):
        shapes |= {f"{part}_task_layer.0.weight": (WIDTH, WIDTH), f"{part}_task_layer.0.bias": (WIDTH,)}
        shapes |= {f"{part}_task_layer.2.weight": (width, WIDTH), f"{part}_task_layer.2.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if "bias" in name else 0.1) + ("norm" in name)
        for name, shape in shapes.items()
    }


def published_file(folder: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    torch.save({"model": published_state() if state is None else state}, folder / "vqkd.pth")
    return folder / "vqkd.pth"


def photos(count: int = 40, size: int = SIDE * PATCH) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def plain_features(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The published network in plain operations, in float64: (B, P, code_dim) before normalisation."""
    w = {name: tensor.double() for name, tensor in state.items()}
    pixels = images.double() * 255 / 127.5 - 1
    maps = F.conv2d(pixels, w["encoder.patch_embed.proj.weight"], w["encoder.patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([w["encoder.cls_token"].expand(len(images), -1, -1), maps.flatten(2).mT], 1) + w["encoder.pos_embed"]
    for block in range(DEPTH):
        b = {name.removeprefix(f"encoder.blocks.{block}."): tensor for name, tensor in w.items()}
        y = F.layer_norm(x, (WIDTH,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        to_q, to_k, to_v = b["attn.qkv.weight"].split(WIDTH)
        query, key, value = y @ to_q.T + b["attn.q_bias"], y @ to_k.T, y @ to_v.T + b["attn.v_bias"]
        heads = []
        for head in range(WIDTH // 64):
            part = slice(64 * head, 64 * head + 64)
            heads.append((query[..., part] @ key[..., part].mT / 8).softmax(-1) @ value[..., part])
        x = x + torch.cat(heads, -1) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        y = F.layer_norm(x, (WIDTH,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        x = x + F.gelu(y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]) @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
    x = F.layer_norm(x[:, 1:], (WIDTH,), w["encoder.fc_norm.weight"], w["encoder.fc_norm.bias"], 1e-6)
    x = torch.tanh(x @ w["encode_task_layer.0.weight"].T + w["encode_task_layer.0.bias"])
    return x @ w["encode_task_layer.2.weight"].T + w["encode_task_layer.2.bias"]


def test_ids_are_those_of_the_published_network(tmp_path: Path) -> None:
    state, images = published_state(), photos()
    features = plain_features(state, images)
    # Codes near the features, of any length, so that many codes are used.
    state["quantize.embedding.weight"] = 3 * features[:, 4].float().repeat(2, 1)[:CODES] + torch.randn(CODES, CODE_DIM)
    tokenizer = VQKD.from_published(published_file(tmp_path, state))
    assert (tokenizer.grid, tokenizer.vocab_size, tokenizer.input_size) == ((SIDE, SIDE), CODES, SIDE * PATCH)
    assert tokenizer.config["num_heads"] == 2

    unit = [x / x.norm(dim=-1, keepdim=True) for x in (features, state["quantize.embedding.weight"].double())]
    cosine, expected = (unit[0] @ unit[1].T).max(-1)
    ids, distances = tokenizer.encode_with_distance(images)
    assert len(expected.unique()) > 10
    assert torch.equal(ids, expected)
    assert torch.allclose(distances, 1 - cosine.float(), atol=1e-5)


def test_default_sizes_are_the_published_ones() -> None:
    """Parameters of encoder and projection, counted by hand; upstream has no bias of the attention keys."""
    tokenizer = VQKD()
    block = 2 * 2 * 768 + (3 * 768 * 768 + 2 * 768) + (768 * 768 + 768) + (2 * 4 * 768 * 768 + 4 * 768 + 768)
    encoder = 768 + 197 * 768 + (3 * 16 * 16 * 768 + 768) + 12 * (block + 768) + 2 * 768
    projection = 768 * 768 + 768 + 768 * 32 + 32
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == encoder + projection
    assert tokenizer.codebook.shape == (8192, 32)


def test_images_are_normalised_with_mean_and_std() -> None:
    torch.manual_seed(0)
    tokenizer = VQKD(8, 4, 64, depth=1, num_heads=1, vocab_size=30, mean=(0.3,), std=(0.2,))
    assert tokenizer.channels == 1
    tokenizer.codebook.copy_(F.normalize(torch.randn(30, 32), dim=-1))
    images = torch.rand(3, 1, 8, 8)
    cosine = tokenizer((images - 0.3) / 0.2) @ tokenizer.codebook.T
    assert torch.equal(tokenizer.encode(images), cosine.argmax(-1))


def test_features_are_float32_under_autocast(tmp_path: Path) -> None:
    tokenizer, images = VQKD.from_published(published_file(tmp_path)), photos(4) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        features = tokenizer(images)
        patches = tokenizer.encoder.forward_features(images)[:, 1:]
    assert features.dtype == torch.float32
    assert torch.allclose(features, F.normalize(tokenizer.projection(patches.float()), dim=-1), atol=1e-6)


def test_saved_files_checkpoints_and_other_decoders_give_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("vqkd", str(published_file(tmp_path)))
    save_tokenizer(tokenizer, tmp_path)
    loaded, expected = load_tokenizer(tmp_path), tokenizer.content_hash
    assert (loaded.content_hash, loaded.origin) == (expected, tokenizer.origin)
    arguments = argparse.Namespace(model="vqkd_encoder_base_decoder_3x768x12_clip")
    torch.save({"model": published_state(), "optimizer": {"state": {}}, "args": arguments}, tmp_path / "c.pth")
    assert VQKD.from_published(tmp_path / "c.pth").content_hash == expected
    state = published_state() | {"decode_task_layer.2.weight": torch.zeros(768, WIDTH)}
    state |= {name: torch.zeros(shape) for name, shape in transformer("decoder", 3, CODE_DIM, 1).items()}
    assert VQKD.from_published(published_file(tmp_path, state)).content_hash == expected


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.pos_embed", None),
        ("encoder.pos_embed", (1, 12, WIDTH)),
        ("encoder.patch_embed.proj.weight", (96, 3, PATCH, PATCH)),
        ("quantize.embedding.weight", (CODES,)),
        ("encoder.fc_norm.bias", None),
        ("encoder.blocks.1.attn.v_bias", (2 * WIDTH,)),
        ("encode_task_layer.2.weight", None),
        ("encoder.blocks.1.gamma_1", (WIDTH,)),
    ],
)
def test_files_of_other_networks_are_refused(name: str, shape: tuple[int, ...] | None, tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in published_state().items() if key != name}
    state |= {} if shape is None else {name: torch.ones(shape)}
    with pytest.raises(MapetError, match="vqkd.pth do not fit a VQ-KD tokenizer"):
        VQKD.from_published(published_file(tmp_path, state))


def test_sizes_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(MapetError, match="image size 30 is not divisible by the patch size 16"):
        VQKD(image_size=30, depth=1)
    with pytest.raises(MapetError, match="cannot build"):
        VQKD(image_size=32, embed_dim=64, num_heads=7, depth=1)
    with pytest.raises(MapetError, match="pass a local file with --teacher-weights"):
        load_tokenizer("vqkd")
