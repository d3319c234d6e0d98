import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mapet import MapetError, load_tokenizer
from mapet.tokenizers.dvae import DVAE, PUBLISHED_WEIGHTS, map_pixels
from mapet.tokenizers.files import save_tokenizer

transformers = pytest.importorskip("transformers")


def photos(count: int = 2, size: int = 112, channels: int = 3) -> torch.Tensor:
    """8-bit images of tiles in random colours."""
    tiles = torch.randint(256, (count, channels, size // 8, size // 8), generator=torch.Generator().manual_seed(0))
    return F.interpolate(tiles / 255, scale_factor=8)


def small_codebook() -> Any:
    """A small network with random weights that give the patches of ``photos`` many different ids."""
    torch.manual_seed(0)
    config = transformers.FlavaImageCodebookConfig(hidden_size=8, vocab_size=64, initializer_range=0.2)
    network = transformers.FlavaImageCodebook(config).eval()
    network.blocks.output.conv.bias -= network(map_pixels(photos())).mean((0, 2, 3))
    return network


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(small_codebook().state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


def test_ids_and_distances_are_those_of_transformers(weights: Path) -> None:
    tokenizer = DVAE.from_published(weights)
    bytes_ = [(photo * 255).round().byte() for photo in photos()]
    process = transformers.FlavaImageProcessor()
    pixels = process(bytes_, return_codebook_pixels=True, return_tensors="pt").codebook_pixel_values
    ids, distance = tokenizer.encode_with_distance(photos())
    assert torch.equal(ids, small_codebook().get_codebook_indices(pixels).flatten(1))
    assert len(ids.unique()) > 16
    assert (tokenizer.grid, tokenizer.vocab_size) == ((14, 14), 64)
    probability = small_codebook().get_codebook_probs(pixels).amax(dim=1).flatten(1)
    assert torch.allclose(distance, -probability.log(), atol=1e-4)


def test_images_of_other_sizes_and_grey_images(weights: Path) -> None:
    tokenizer, grey, large = DVAE.from_published(weights), photos(channels=1), photos(size=224)
    assert torch.equal(tokenizer.encode(grey), tokenizer.encode(grey.repeat(1, 3, 1, 1)))
    small = F.interpolate(large, (112, 112), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(tokenizer.encode(large), tokenizer.encode(small))
    assert DVAE.from_published(weights, input_size=56).encode(large).shape == (2, 49)


def test_saved_tokenizer_gives_the_same_ids(weights: Path, tmp_path: Path) -> None:
    tokenizer = DVAE.from_published(weights, input_size=64)
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert torch.equal(loaded.encode(photos()), tokenizer.encode(photos()))
    assert (loaded.content_hash, loaded.origin) == (tokenizer.content_hash, tokenizer.origin)
    assert loaded.origin["weights"] == str(weights)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_weights_of_a_whole_flava_in_half_precision(tmp_path: Path) -> None:
    state = {f"image_codebook.{name}": tensor.half() for name, tensor in small_codebook().state_dict().items()}
    torch.save({**state, "flava.logit_scale": torch.ones(())}, tmp_path / "flava.bin")
    expected = small_codebook().half().float().get_codebook_indices(map_pixels(photos())).flatten(1)
    assert torch.equal(DVAE.from_published(tmp_path / "flava.bin").encode(photos()), expected)


def test_default_sizes_are_those_of_dall_e() -> None:
    with torch.device("meta"):
        tokenizer = DVAE()
    assert (tokenizer.grid, tokenizer.vocab_size, tokenizer.channels) == ((14, 14), 8192, 3)
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == 53_786_240


def test_published_weights_come_from_the_hub(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {("facebook/flava-image-codebook", "pytorch_model.bin"): str(weights)}
    monkeypatch.setattr("mapet.models.tensors.hf_hub_download", lambda *asked: files[asked])
    tokenizer = load_tokenizer("dvae")
    assert tokenizer.origin["weights"] == PUBLISHED_WEIGHTS
    assert torch.equal(tokenizer.encode(photos()), DVAE.from_published(weights).encode(photos()))


def test_other_weights_are_refused(weights: Path) -> None:
    name = "blocks.group_2.group.block_1.id_path.weight"
    for change, message in (
        ({"blocks.input.bias": None}, "do not fit the dVAE .*'blocks.input"),
        ({name: torch.ones(16, 4, 1, 1)}, rf"do not fit the dVAE .*'{name}' has shape \(16, 4, 1, 1\)"),
    ):
        state = small_codebook().state_dict() | change
        torch.save({key: value for key, value in state.items() if value is not None}, weights)
        with pytest.raises(MapetError, match=message):
            DVAE.from_published(weights)
    with pytest.raises(MapetError, match="cannot read images of 100 pixels; choose a multiple of 8"):
        DVAE(input_size=100)
    torch.save(small_codebook(), weights)  # a whole module, as OpenAI's encoder.pkl
    with pytest.raises(MapetError, match="cannot be read as tensors: they need the Python object .*FlavaImageCodebook"):
        DVAE.from_published(weights)


def test_missing_transformers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # makes the import fail
    with pytest.raises(MapetError, match=r"needs transformers .*pip install 'mapet\[dvae\]'"):
        DVAE.from_published()
