import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from tests.conftest import QUIET, pretrain_tiny, records, resume_pretraining, under_torchrun

from mapet import MapetError
from mapet.cli import main
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.engine.files import held_folder
from mapet.jobs.tokenizer.encode import check_tokens, encode_images
from mapet.tokenizers.files import save_tokenizer
from mapet.tokenizers.kmeans_tokenizers import KFeatures, KPixels, KTokenizer
from mapet.tokenizers.teachers import build_teacher
from mapet.tokenstore.store import TokenStore

ENCODE: dict[str, Any] = {"views": 2, "mirror": True, "crop_min": 0.5, "workers": 0}


def fitted(tokenizer: KTokenizer, data: Path, folder: Path) -> Path:
    images = open_images(str(data))
    views = torch.stack([images.load(i, Reading(tokenizer.channels))[:, :28, :28] for i in range(len(images))]) / 255
    tokenizer.fit(tokenizer.features(views).flatten(0, 1), seed=0)
    folder.mkdir()
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture
def pixels(digits: Path, tmp_path: Path) -> Path:
    return fitted(KPixels(28, 7, 1, vocab_size=16), digits, tmp_path / "pixels")


def encode(data: Path, tokenizer: Path, out: Path, **values: Any) -> dict[str, Any]:
    return encode_images({**ENCODE, "data": str(data), "tokenizer": str(tokenizer), **values}, out, console=QUIET)


def check(tokens: Path, data: Path, **values: Any) -> dict[str, Any]:
    return check_tokens({"tokens": str(tokens), "data": str(data), **values}, console=QUIET)


def train(data: Path, out: Path, **values: Any) -> list[float]:
    pretrain_tiny(data, out, **{"vocab_size": None, "steps": 14, **values})
    return [record["loss"] for record in records(out)]


def content(store: Path) -> list[bytes]:
    return [(store / name).read_bytes() for name in ("header.json", "ids.npy", "images.npy")]


def flip_last_byte(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def test_training_from_a_store_equals_training_online(digits: Path, pixels: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    network = KFeatures(build_teacher("test_resnet", 2, tmp_path / "weights.pth"), (4, 4), 16, 64)
    for name, tokenizer, channels in (
        ("pixels", pixels, 1),
        ("network", fitted(network, digits, tmp_path / "features"), 3),
    ):
        views = {"views": 2, "mirror": True, "crop_min": 0.5, "flip": 0.5}
        encode(digits, tokenizer, tmp_path / f"{name} tokens", channels=channels)
        online = train(digits, tmp_path / f"{name} online", tokenizer=str(tokenizer), channels=channels, **views)
        stored = train(digits, tmp_path / f"{name} stored", tokens=str(tmp_path / f"{name} tokens"), channels=channels)
        assert stored == pytest.approx(online, abs=1e-6)
        assert not (tmp_path / f"{name} stored" / "tokenizer").exists()
        config = yaml.safe_load((tmp_path / f"{name} stored" / "config.yaml").read_text())
        assert {key: config[key] for key in views} == views


def test_mirrored_views_are_mirror_images(digits: Path, tmp_path: Path) -> None:
    tokenizer = fitted(KPixels(28, 28, 1, vocab_size=8, contrast=False), digits, tmp_path / "whole")
    encode(digits, tokenizer, tmp_path / "plain", views=1, mirror=False, flip=0.0)
    encode(digits, tokenizer, tmp_path / "flipped", views=1, mirror=False, flip=1.0)
    encode(digits, tokenizer, tmp_path / "both", views=1)
    plain, flipped, both = (np.load(tmp_path / name / "ids.npy") for name in ("plain", "flipped", "both"))
    assert np.array_equal(both, np.concatenate([plain, flipped], axis=1))


def test_new_and_changed_images_are_encoded(digits: Path, pixels: Path, tmp_path: Path) -> None:
    data, tokens = tmp_path / "data", tmp_path / "tokens"
    shutil.copytree(digits, data)
    late = data / "class 3" / "1.png"
    late.rename(tmp_path / "late.png")
    encode(data, pixels, tokens)
    before = np.load(tokens / "ids.npy")
    (tmp_path / "late.png").rename(late)  # sorted between others, but its row is appended
    with pytest.raises(MapetError, match=r"1 of 60 images have no tokens.*'class 3/1\.png'.*tokenizer encode"):
        train(data, tmp_path / "run", tokens=str(tokens))
    assert check(tokens, data)["missing"] == ["class 3/1.png"]
    result = encode(data, pixels, tokens)
    assert (result["encoded"], result["kept"]) == (1, 59)
    after = np.load(tokens / "ids.npy")
    assert after.shape == (60, 4, 16)
    assert np.array_equal(after[:59], before)

    Image.new("L", (28, 28), 77).save(data / "class 5" / "2.png")
    with pytest.raises(MapetError, match=r"class 5/2\.png.* changed since its tokens were made.*tokenizer encode"):
        train(data, tmp_path / "run", tokens=str(tokens), steps=40)
    found = check(tokens, data)
    assert (found["ok"], found["changed"], found["missing"]) == (False, ["class 5/2.png"], [])
    assert (encode(data, pixels, tokens)["encoded"], check(tokens, data)["ok"]) == (1, True)
    late.unlink()
    result = encode(data, pixels, tokens)
    assert (result["encoded"], result["kept"], result["absent"]) == (0, 59, 1)


def test_empty_and_corrupt_rows_are_completed(digits: Path, pixels: Path, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    encode(digits, pixels, whole)
    images = open_images(str(digits))
    half.mkdir()
    store = TokenStore.create(half, TokenStore(whole).header)
    store.append(images.keys)
    digests = torch.stack([images.digest(i) for i in range(30)]).numpy()
    store.write(np.arange(30), digests, torch.from_numpy(np.load(whole / "ids.npy")[:30]).long(), np.ones(30, bool))
    for expected in (30, 1):
        result = encode(digits, pixels, half)
        assert (result["encoded"], result["kept"]) == (expected, 60 - expected)
        assert content(half) == content(whole)
        flip_last_byte(half / "ids.npy")
    found = check(half, digits)
    assert (found["ok"], found["corrupt"], found["changed"]) == (False, 1, [])
    with pytest.raises(MapetError, match="fail their checksum"):
        train(digits, tmp_path / "run", tokens=str(half), steps=40)


def test_two_processes_write_what_one_writes(digits: Path, pixels: Path, tmp_path: Path) -> None:
    encode(digits, pixels, tmp_path / "one")
    recipe = tmp_path / "encode.yaml"
    recipe.write_text(yaml.safe_dump({**ENCODE, "data": str(digits), "tokenizer": str(pixels)}))
    command = [sys.executable, "-m", "mapet", "tokenizer", "encode", "--config", str(recipe), "--json"]
    done = subprocess.run(under_torchrun([*command, "--out", str(tmp_path / "two")]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["encoded"] == 60
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_damaged_images_are_marked(digits: Path, pixels: Path, tmp_path: Path) -> None:
    data, tokens = tmp_path / "data", tmp_path / "tokens"
    shutil.copytree(digits, data)
    (data / "class 2" / "3.png").write_text("no image at all")
    os.mkfifo(data / "class 0" / "pipe.png")  # it must not be waited for
    for encoded in (59, 0):
        result = encode(data, pixels, tokens)
        assert (result["encoded"], result["kept"], result["damaged"]) == (encoded, 59 - encoded, 2)
    with pytest.raises(MapetError, match=r"2 of 61 images of .* cannot be read.*--max-damaged \(now 0\.01\)"):
        encode(data, pixels, tokens, max_damaged=0.01)
    found = check(tokens, data)
    assert (found["ok"], found["damaged"]) == (True, 2)
    assert len(train(data, tmp_path / "run", tokens=str(tokens), steps=20)) == 20
    shutil.copy(digits / "class 2" / "3.png", data / "class 2" / "3.png")
    assert encode(data, pixels, tokens)["encoded"] == 1


def test_stores_that_do_not_fit_are_refused(digits: Path, pixels: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    encode(digits, pixels, tokens)
    other = fitted(KPixels(28, 7, 1, vocab_size=15), digits, tmp_path / "other")

    def refused(says: str, **values: Any) -> None:
        with pytest.raises(MapetError, match=says):
            train(digits, tmp_path / "run", tokens=str(tokens), **values)
        assert not (tmp_path / "run").exists()

    refused(r"made with crop_min 0\.5, but the run asks for 0\.9; pass --crop-min 0\.5", crop_min=0.9)
    refused("made with views 2, but the run asks for 3", views=3)
    refused("made with channels 1, but the run asks for 3; pass --channels 1", channels=3)
    refused("made with vocab_size 16, but the run asks for 99", vocab_size=99)
    refused("another tokenizer than", tokenizer=str(other))
    refused(r"gives 4 x 4 ids an image, but the model has 2 x 2 patches", patch_size=14)
    with pytest.raises(MapetError, match="tokenizer_hash"):
        encode(digits, other, tokens)
    with pytest.raises(MapetError, match=r"view crop_min 0\.5, but 0\.6"):
        encode(digits, pixels, tokens, crop_min=0.6)
    with pytest.raises(MapetError, match="was not made with tokenizer"):
        check(tokens, digits, tokenizer=str(other))
    train(digits, tmp_path / "begun", tokens=str(tokens))
    shutil.rmtree(tokens)
    encode(digits, pixels, tokens, seed=7)
    with pytest.raises(MapetError, match="token store is not what the run"):
        resume_pretraining(tmp_path / "begun", data=str(digits))


def test_check_encodes_a_sample_again(digits: Path, tmp_path: Path) -> None:
    train(digits, tmp_path / "run", vocab_size=16, steps=1)
    tokens = tmp_path / "tokens"
    encode(digits, tmp_path / "run", tokens)
    assert check(tokens, digits)["agreement"] == 1.0
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert check(tokens, digits)["agreement"] is None
    elsewhere = str(tmp_path / "elsewhere")
    assert check(tokens, digits, tokenizer=elsewhere)["agreement"] == 1.0
    # The ids of other views, with a valid checksum.
    images = open_images(str(digits))
    digests = torch.stack([images.digest(i) for i in range(60)]).numpy()
    store = TokenStore(tokens)
    store.write(np.arange(60), digests, torch.zeros(60, 4, 16, dtype=torch.int64), np.ones(60, bool))
    found = check(tokens, digits, tokenizer=elsewhere)
    assert (found["ok"], found["agreement"] < 0.9) == (False, True)


def test_output_folders_that_cannot_be_used_are_refused(digits: Path, pixels: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    with pytest.raises(MapetError, match=r"does not fit: images have shape \(3, 28, 28\).*another --channels"):
        encode(digits, pixels, tokens, channels=3)
    assert not tokens.exists()
    (tmp_path / "file").touch()
    for out, says in ((tmp_path / "file", "file"), ("", "name of the output folder is empty"), ("x" * 300, "xxx")):
        with pytest.raises(MapetError, match=says):
            encode(digits, pixels, out)  # type: ignore[arg-type]
    with pytest.raises(MapetError, match="is not empty and holds no token store"):
        encode(digits, tokens.parent / "pixels", pixels)
    tokens.mkdir()
    with held_folder(tokens), pytest.raises(MapetError, match="is in use by another process"):
        encode(digits, pixels, tokens)


@pytest.mark.parametrize("size", [1000, 3500])  # smaller than images.npy; smaller than ids.npy
def test_encoding_goes_on_after_a_full_disk(size: int, digits: Path, pixels: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As on a full disk, a write that does not fit is cut. Python ignores the signal that comes with it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(MapetError, match="tokens cannot be written to .*File too large.*; free some space"):
            encode(digits, pixels, tmp_path / "tokens")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    encode(digits, pixels, tmp_path / "tokens")
    encode(digits, pixels, tmp_path / "whole")
    assert content(tmp_path / "tokens") == content(tmp_path / "whole")


def test_commands_print_json_and_exit_with_a_status(digits: Path, pixels: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    tokens = str(tmp_path / "tokens")
    flags = ["--workers", "1", "--json"]
    assert main(["tokenizer", "encode", str(digits), "--tokenizer", str(pixels), "--out", tokens, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["encoded"], found["kept"], found["damaged"], found["absent"], found["views"]) == (60, 0, 0, 0, 8)
    header = json.loads((tmp_path / "tokens" / "header.json").read_text())
    assert header["view"] == {"crop_min": 0.2, "flip": 0.5, "mirror": False, "views": 8, "channels": 1}
    assert main(["tokenizer", "check", str(digits), "--tokens", tokens, *flags]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    out = str(tmp_path / "report")
    assert main(["tokenizer", "report", str(digits), "--tokenizer", str(pixels), "--out", out, *flags]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 60
    flip_last_byte(tmp_path / "tokens" / "ids.npy")
    assert main(["tokenizer", "check", str(digits), "--tokens", tokens]) == 1
    assert "1 that fail their checksum" in " ".join(capsys.readouterr().err.split())
    assert main(["tokenizer", "check", str(digits), "--tokens", tokens, "--workers", "-1"]) == 2
    assert "workers = -1" in capsys.readouterr().err
