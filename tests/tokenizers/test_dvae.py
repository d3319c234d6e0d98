from __future__ import annotations

import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F

from mapet import MapetError
from mapet.tokenizers.dvae import DVAE, PUBLISHED, map_pixels
from mapet.tokenizers.files import TOKENIZERS, load_tokenizer, save_tokenizer

transformers = pytest.importorskip("transformers")


def photos(count: int = 2, size: int = 112, channels: int = 3) -> torch.Tensor:
    """8-bit images of tiles in random colours."""
    tiles = torch.randint(256, (count, channels, size // 8, size // 8), generator=torch.Generator().manual_seed(0))
    return F.interpolate(tiles / 255, scale_factor=8)


def small_codebook(blocks: int = 2):  # type: ignore[no-untyped-def]
    """The network itself, small, with random weights that give the patches of ``photos`` many different ids."""
    torch.manual_seed(0)
    config = transformers.FlavaImageCodebookConfig(
        hidden_size=8, vocab_size=64, num_blocks_per_group=blocks, initializer_range=0.2
    )
    network = transformers.FlavaImageCodebook(config).eval()
    network.blocks.output.conv.bias -= network(map_pixels(photos())).mean((0, 2, 3))
    return network


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(small_codebook().state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


def test_pixels_are_mapped_off_the_ends() -> None:
    assert torch.allclose(map_pixels(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.1, 0.5, 0.9]))


def test_ids_are_those_of_transformers_own_pipeline(weights: Path) -> None:
    tokenizer = DVAE.from_published(weights)
    found = tokenizer.encode(photos())
    assert torch.equal(found, small_codebook().get_codebook_indices(map_pixels(photos())).flatten(1))
    assert found.shape == (2, 196)
    assert found.dtype == torch.int64
    assert (tokenizer.grid, tokenizer.vocab_size) == ((14, 14), 64)
    assert len(found.unique()) > 16, "too few to tell anything"
    # From 8-bit images on: the processor's own mapping is the one that is done here.
    process = transformers.FlavaImageProcessor()
    bytes_ = [(photo * 255).round().byte() for photo in photos()]
    pixels = process(bytes_, return_codebook_pixels=True, return_tensors="pt").codebook_pixel_values
    assert torch.allclose(pixels, map_pixels(photos()), atol=1e-6)
    assert torch.equal(found, small_codebook().get_codebook_indices(pixels).flatten(1))


def test_distance_is_minus_the_log_probability(weights: Path) -> None:
    _, distance = DVAE.from_published(weights).encode_with_distance(photos())
    probability = small_codebook().get_codebook_probs(map_pixels(photos())).amax(dim=1).flatten(1)
    assert torch.allclose(distance, -probability.log(), atol=1e-4)
    assert distance.std() > 0.1


def test_any_size_and_grey(weights: Path) -> None:
    tokenizer = DVAE.from_published(weights)
    grey = photos(channels=1)
    assert torch.equal(tokenizer.encode(grey), tokenizer.encode(grey.repeat(1, 3, 1, 1)))
    large = photos(size=224)
    small = F.interpolate(large, (112, 112), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(tokenizer.encode(large), tokenizer.encode(small))
    coarse = DVAE.from_published(weights, input_size=56)
    assert coarse.grid == (7, 7)
    assert coarse.encode(large).shape == (2, 49)


@pytest.mark.parametrize("blocks", [1, 2])
def test_saved_and_loaded_gives_the_same_ids(blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOKENIZERS, "dvae", DVAE)
    torch.save(small_codebook(blocks).state_dict(), tmp_path / "w.pth")
    tokenizer = DVAE.from_published(tmp_path / "w.pth", input_size=64)
    assert tokenizer.origin["weights"] == str(tmp_path / "w.pth")
    assert len(tokenizer.origin["sha256"]) == 64
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert torch.equal(loaded.encode(photos()), tokenizer.encode(photos()))
    assert (loaded.content_hash, loaded.origin, loaded.config) == (
        tokenizer.content_hash,
        tokenizer.origin,
        {"input_size": 64, "vocab_size": 64, "hidden_size": 8, "blocks_per_group": blocks},
    )
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_whole_flava_and_half_precision_are_read(weights: Path, tmp_path: Path) -> None:
    state = {f"image_codebook.{name}": tensor.half() for name, tensor in small_codebook().state_dict().items()}
    torch.save({**state, "flava.logit_scale": torch.ones(())}, tmp_path / "flava.bin")
    tokenizer = DVAE.from_published(tmp_path / "flava.bin")
    expected = small_codebook().half().float().get_codebook_indices(map_pixels(photos())).flatten(1)
    assert torch.equal(tokenizer.encode(photos()), expected)


def test_the_published_size_is_the_default() -> None:
    """Shapes of OpenAI's encoder: 256 channels that double from group to group, bottlenecks of a quarter."""
    with torch.device("meta"):
        tokenizer = DVAE()
    shapes = {name: tuple(tensor.shape) for name, tensor in tokenizer.encoder.state_dict().items()}
    assert (tokenizer.grid, tokenizer.vocab_size, tokenizer.channels) == ((14, 14), 8192, 3)
    assert len(shapes) == 74
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == 53_786_240
    assert shapes["blocks.input.weight"] == (256, 3, 7, 7)
    assert shapes["blocks.group_1.group.block_2.res_path.path.conv_1.weight"] == (64, 256, 3, 3)
    assert shapes["blocks.group_2.group.block_1.id_path.weight"] == (512, 256, 1, 1)
    assert shapes["blocks.group_4.group.block_2.res_path.path.conv_4.weight"] == (2048, 512, 1, 1)
    assert shapes["blocks.output.conv.weight"] == (8192, 2048, 1, 1)


def test_published_weights_come_from_the_hub(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MapetError, match=r"hf-hub:facebook/flava-image-codebook/.* could not be fetched .*local file"):
        DVAE.from_published()
    # As the hub's client lays out what it has downloaded.
    folder, commit = tmp_path / "cache/models--facebook--flava-image-codebook", "0" * 40
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots" / commit / "pytorch_model.bin").write_bytes(weights.read_bytes())
    tokenizer = DVAE.from_published()
    assert tokenizer.origin["weights"] == PUBLISHED
    assert torch.equal(tokenizer.encode(photos()), DVAE.from_published(weights).encode(photos()))


def test_other_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match="weights .*none.bin do not exist"):
        DVAE.from_published(tmp_path / "none.bin")
    state = small_codebook().state_dict()
    name = "blocks.group_2.group.block_1.id_path.weight"
    torch.save({key: value for key, value in state.items() if key != name}, weights)
    with pytest.raises(MapetError, match=rf"do not fit the dVAE .*'{name}' is missing \(1 missing, 0 of wrong shape"):
        DVAE.from_published(weights)
    torch.save({**state, name: state[name][:, :4]}, weights)
    with pytest.raises(MapetError, match=rf"'{name}' has shape \(16, 4, 1, 1\) instead of \(16, 8, 1, 1\)"):
        DVAE.from_published(weights)
    torch.save({"some": torch.ones(1)}, weights)
    with pytest.raises(MapetError, match="'blocks.input.weight' is missing .*74 missing"):
        DVAE.from_published(weights)
    torch.save(small_codebook(), weights)  # a whole module, as OpenAI's encoder.pkl is
    with pytest.raises(MapetError, match="cannot be read as tensors: they need the Python object .*FlavaImageCodebook"):
        DVAE.from_published(weights)


@pytest.mark.parametrize("size", [0, 100])
def test_sizes_that_patches_do_not_tile_are_refused(size: int) -> None:
    with pytest.raises(MapetError, match=f"cannot read images of {size} pixels; choose a multiple of 8"):
        DVAE(input_size=size)


def test_missing_transformers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # Python's own way to forbid an import
    with pytest.raises(MapetError, match=r"needs transformers .*pip install 'mapet\[dvae\]'"):
        DVAE.from_published()
