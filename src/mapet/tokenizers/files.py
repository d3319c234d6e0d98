"""Tokenizers as folders: ``tokenizer.json`` and ``tokenizer.safetensors``."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from mapet.errors import MapetError, reason_of
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.dvae import DVAE
from mapet.tokenizers.kmeans_tokenizers import KFeatures, KPixels
from mapet.tokenizers.vqkd import VQKD

TOKENIZERS: dict[str, type[Tokenizer]] = {"pixels": KPixels, "features": KFeatures, "vqkd": VQKD, "dvae": DVAE}

# Tokenizers trained by others, by name: functions of the source of the weights, which is None for the published ones.
PUBLISHED: dict[str, Callable[[str | None], Tokenizer]] = {"dvae": DVAE.from_published, "vqkd": VQKD.from_published}

CONFIG_FILE, TENSOR_FILE = "tokenizer.json", "tokenizer.safetensors"


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer.safetensors`` into an existing folder."""
    save_file({name: tensor.contiguous() for name, tensor in tokenizer.state_dict().items()}, folder / TENSOR_FILE)
    content = {
        "kind": tokenizer.kind,
        "config": tokenizer.config,
        "origin": tokenizer.origin,
        "hash": tokenizer.content_hash,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def find_tokenizer(name: str | Path) -> Path | None:
    """Return the folder of a tokenizer: a name, or ``tokenizer/`` in the run that it names; None if it is neither."""
    # os.path.isfile returns False for text that cannot be a file name, where pathlib raises.
    found = (folder for folder in (Path(name), Path(name) / "tokenizer") if os.path.isfile(folder / CONFIG_FILE))  # noqa: PTH113
    return next(found, None)


def load_tokenizer(name: str | Path, weights: str | None = None) -> Tokenizer:
    """Read a saved tokenizer, or build a published one.

    Args:
        name: the folder of a tokenizer, or of a run that made one; or a name in ``PUBLISHED``.
        weights: weights of a published tokenizer: a file, a URL or ``hf-hub:OWNER/REPOSITORY/FILE``; None takes the
            published ones.

    Raises:
        MapetError: if the folder holds no tokenizer or a damaged one, or the weights cannot be read.
    """
    if name in PUBLISHED:
        return PUBLISHED[str(name)](weights)
    if weights is not None:
        raise MapetError(f"tokenizer {name} has its own weights; leave --teacher-weights out")
    folder = find_tokenizer(name)
    if folder is None:
        raise MapetError(f"{name} holds no fitted tokenizer ({CONFIG_FILE}); fit one with: mapet tokenizer fit")
    try:
        content = json.loads((folder / CONFIG_FILE).read_text())
        tokenizer = TOKENIZERS[content["kind"]].from_config(content["config"])
        tokenizer.load_state_dict(load_file(folder / TENSOR_FILE))
        tokenizer.origin = dict(content["origin"])
        if tokenizer.content_hash != content["hash"]:
            raise ValueError("its tensors do not match its hash")
    except Exception as error:  # a damaged configuration makes networks fail in many ways
        what = reason_of(error, most=200)
        raise MapetError(f"tokenizer {folder} is damaged ({what}); restore it or fit it again") from error
    return tokenizer.eval()
