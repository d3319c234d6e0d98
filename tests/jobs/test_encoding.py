from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from rich.console import Console
from tests.conftest import TINY

from mapet import MapetError
from mapet.cli import main
from mapet.data.open import open_images
from mapet.jobs.pretrain.run import pretrain
from mapet.jobs.tokenizer.encode import check_tokens, encode_images
from mapet.tokenizers.base import KTokenizer
from mapet.tokenizers.files import save_tokenizer
from mapet.tokenizers.kfeatures import KFeatures
from mapet.tokenizers.kpixels import KPixels
from mapet.tokenstore.store import TokenStore

QUIET = Console(quiet=True)
ENCODE: dict[str, Any] = {"views": 2, "mirror": True, "crop_min": 0.5, "workers": 0}


def fitted(tokenizer: KTokenizer, data: Path, folder: Path) -> Path:
    images = open_images(str(data))
    views = torch.stack([images.load(i, tokenizer.channels)[:, :28, :28] for i in range(len(images))]) / 255
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
    config = {**TINY, "vocab_size": None, "data": str(data), "steps": 14, **values}
    pretrain(config, out, console=QUIET)
    return [line["loss"] for line in map(json.loads, (out / "metrics.jsonl").open())]


def content(store: Path) -> list[bytes]:
    return [(store / name).read_bytes() for name in ("header.json", "index.bin", "ids.bin")]


def test_training_from_a_store_is_training_online_on_the_same_views(digits: Path, pixels: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    network = KFeatures.from_teacher("test_resnet", (4, 4), 16, 64, stage=2, weights=tmp_path / "weights.pth")
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


def test_the_ids_are_of_the_smallest_type_and_the_header_says_what_they_are(
    digits: Path, pixels: Path, tmp_path: Path
) -> None:
    result = encode(digits, pixels, tmp_path / "tokens", workers=1)
    assert (result["encoded"], result["kept"], result["damaged"], result["views"]) == (60, 0, 0, 4)
    assert (tmp_path / "tokens" / "ids.bin").stat().st_size == 60 * 4 * 16
    header = json.loads((tmp_path / "tokens" / "header.json").read_text())
    view = {"crop_min": 0.5, "flip": 0.5, "mirror": True, "views": 2, "channels": 1}
    assert header["view"] == view
    assert header["grid"] == [4, 4]


def test_mirrored_views_are_mirror_images(digits: Path, tmp_path: Path) -> None:
    tokenizer = fitted(KPixels(28, 28, 1, vocab_size=8, contrast=False), digits, tmp_path / "whole")
    encode(digits, tokenizer, tmp_path / "plain", views=1, mirror=False, flip=0.0)
    encode(digits, tokenizer, tmp_path / "flipped", views=1, mirror=False, flip=1.0)
    encode(digits, tokenizer, tmp_path / "both", views=1)
    plain, flipped = ((tmp_path / name / "ids.bin").read_bytes() for name in ("plain", "flipped"))
    both = (tmp_path / "both" / "ids.bin").read_bytes()
    assert both[::2] == plain
    assert both[1::2] == flipped


def test_new_changed_and_vanished_images(digits: Path, pixels: Path, tmp_path: Path) -> None:
    data, tokens = tmp_path / "data", tmp_path / "tokens"
    shutil.copytree(digits, data)
    late = data / "class 3" / "1.png"
    late.rename(tmp_path / "late.png")
    encode(data, pixels, tokens)
    before = content(tokens)
    # It is sorted between others, and yet what was there stays as it is.
    (tmp_path / "late.png").rename(late)
    result = encode(data, pixels, tokens)
    assert (result["encoded"], result["kept"]) == (1, 59)
    after = content(tokens)
    assert after[2].startswith(before[2])
    assert len(after[2]) == len(before[2]) + 64

    Image.new("L", (28, 28), 77).save(data / "class 5" / "2.png")
    with pytest.raises(MapetError, match=r"class 5/2\.png.* changed since its tokens were made.*tokenizer encode"):
        train(data, tmp_path / "run", tokens=str(tokens), steps=40)
    found = check(tokens, data)
    assert (found["ok"], found["changed"], found["missing"]) == (False, ["class 5/2.png"], [])
    assert (encode(data, pixels, tokens)["encoded"], check(tokens, data)["ok"]) == (1, True)

    shutil.copy(late, data / "new.png")
    with pytest.raises(MapetError, match=r"1 of 61 images have no tokens.*'new\.png'.*tokenizer encode"):
        train(data, tmp_path / "run", tokens=str(tokens))
    (data / "new.png").unlink()
    late.unlink()
    result = encode(data, pixels, tokens)
    assert (result["encoded"], result["kept"], result["absent"]) == (0, 59, 1)


def test_a_killed_encoding_is_completed_to_the_same_bytes(digits: Path, pixels: Path, tmp_path: Path) -> None:
    data = tmp_path / "many"
    for number in range(40):
        shutil.copytree(digits, data / str(number))
    values = {**ENCODE, "data": str(data), "tokenizer": str(pixels)}
    encode_images(values, tmp_path / "whole", console=QUIET)
    recipe = tmp_path / "encode.yaml"
    recipe.write_text(yaml.safe_dump(values))
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "mapet", "tokenizer", "encode", "--config", str(recipe), "--out", str(killed)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if (killed / "ids.bin").exists() and TokenStore.open(killed).verify().written:
            process.kill()
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL
    done = TokenStore.open(killed).verify().written
    assert 0 < done < 2400
    finished = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    result = json.loads(finished.stdout)
    assert (result["encoded"], result["kept"]) == (2400 - done, done)
    assert content(killed) == content(tmp_path / "whole")


def test_two_processes_write_what_one_writes(digits: Path, pixels: Path, tmp_path: Path) -> None:
    encode(digits, pixels, tmp_path / "one")
    recipe = tmp_path / "encode.yaml"
    recipe.write_text(yaml.safe_dump({**ENCODE, "data": str(digits), "tokenizer": str(pixels)}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*launcher, "mapet", "tokenizer", "encode", "--config", str(recipe), "--out", str(tmp_path / "two"), "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["encoded"] == 60
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_damaged_images_are_noted_and_replaced_in_training(digits: Path, pixels: Path, tmp_path: Path) -> None:
    data, tokens = tmp_path / "data", tmp_path / "tokens"
    shutil.copytree(digits, data)
    (data / "class 2" / "3.png").write_text("no image at all")
    result = encode(data, pixels, tokens)
    assert (result["encoded"], result["damaged"]) == (59, 1)
    result = encode(data, pixels, tokens)
    assert (result["encoded"], result["kept"], result["damaged"]) == (0, 59, 1), "it is tried again: a decoder may fail"
    with pytest.raises(MapetError, match=r"1 of 60 images of .* cannot be read.*--max-damaged \(now 0\.01\)"):
        encode(data, pixels, tokens, max_damaged=0.01)
    found = check(tokens, data)
    assert (found["ok"], found["damaged"]) == (True, 1)
    assert len(train(data, tmp_path / "run", tokens=str(tokens), steps=20)) == 20
    shutil.copy(digits / "class 2" / "3.png", data / "class 2" / "3.png")
    assert encode(data, pixels, tokens)["encoded"] == 1


def test_a_store_that_does_not_fit_is_refused(digits: Path, pixels: Path, tmp_path: Path) -> None:
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
    whole = (tokens / "ids.bin").read_bytes()
    (tokens / "ids.bin").write_bytes(whole[:-5])
    refused(r"cut short: ids\.bin has 3835 bytes instead of 3840")
    (tokens / "ids.bin").write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    found = check(tokens, digits)
    assert (found["ok"], found["corrupt"]) == (False, 1)
    with pytest.raises(MapetError, match=r"class 0/0\.png.* fail their checksum"):
        train(digits, tmp_path / "run", tokens=str(tokens), steps=40)


def test_ids_of_another_encoder_are_noticed_by_check(digits: Path, pixels: Path, tmp_path: Path) -> None:
    """As if other views had been encoded than the header says: everything fits but the ids."""
    tokens = tmp_path / "tokens"
    encode(digits, pixels, tokens)
    assert check(tokens, digits)["agreement"] == 1.0
    images = open_images(str(digits))
    with TokenStore.open(tokens, writable=True) as store:
        rows = store.plan(images.keys)
        digests = torch.stack([images.digest(i) for i in range(60)]).numpy()
        store.write(rows, digests, torch.zeros(60, 4, 16, dtype=torch.int64))
    found = check(tokens, digits)
    assert not found["ok"]
    assert found["agreement"] < 0.9


def test_what_cannot_be_encoded_leaves_nothing_behind(digits: Path, pixels: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match=r"does not fit: images have shape \(3, 28, 28\).*another --channels"):
        encode(digits, pixels, tmp_path / "tokens", channels=3)
    assert not (tmp_path / "tokens").exists()
    (tmp_path / "file").touch()
    for out, says in ((tmp_path / "file", "file"), ("", "name of the output folder is empty"), ("x" * 300, "xxx")):
        with pytest.raises(MapetError, match=says):
            encode(digits, pixels, out)  # type: ignore[arg-type]
    encode(digits, pixels, tmp_path / "tokens")


def test_pipes_are_damaged_images_and_not_waited_for(digits: Path, pixels: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    os.mkfifo(data / "pipe.png")
    for _ in range(2):
        assert encode(data, pixels, tmp_path / "tokens")["damaged"] == 1


def test_a_store_of_other_views_does_not_slip_into_a_resumed_run(digits: Path, pixels: Path, tmp_path: Path) -> None:
    tokens, out = tmp_path / "tokens", tmp_path / "run"
    encode(digits, pixels, tokens)
    train(digits, out, tokens=str(tokens))
    shutil.rmtree(tokens)
    encode(digits, pixels, tokens, seed=7)
    with pytest.raises(MapetError, match="token store is not what the run"):
        pretrain({"data": str(digits)}, out, resume=True, console=QUIET)


def test_check_finds_the_tokenizer_in_a_runs_folder(digits: Path, tmp_path: Path) -> None:
    train(digits, tmp_path / "run", vocab_size=16, steps=1)
    encode(digits, tmp_path / "run", tmp_path / "tokens")
    assert check(tmp_path / "tokens", digits)["agreement"] == 1.0
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert check(tmp_path / "tokens", digits)["agreement"] is None
    assert check(tmp_path / "tokens", digits, tokenizer=str(tmp_path / "elsewhere"))["agreement"] == 1.0


def test_the_commands_speak_json_and_exit_with_a_status(digits: Path, pixels: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    tokens = str(tmp_path / "tokens")
    flags = ["--workers", "0", "--json"]
    assert main(["tokenizer", "encode", str(digits), "--tokenizer", str(pixels), "--out", tokens, *flags]) == 0
    assert json.loads(capsys.readouterr().out)["views"] == 8
    assert main(["tokenizer", "check", str(digits), "--tokens", tokens, *flags]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    out = str(tmp_path / "report")
    assert main(["tokenizer", "report", str(digits), "--tokenizer", str(pixels), "--out", out, *flags]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 60
    whole = (tmp_path / "tokens" / "ids.bin").read_bytes()
    (tmp_path / "tokens" / "ids.bin").write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert main(["tokenizer", "check", str(digits), "--tokens", tokens]) == 1
    assert "1 that fail their checksum" in " ".join(capsys.readouterr().err.split())
    assert main(["tokenizer", "check", str(digits), "--tokens", tokens, "--workers", "-1"]) == 2
    assert "workers = -1" in capsys.readouterr().err
