"""Visual tokenizers: images in, one id per patch out."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mapet.errors import MapetError, nearest
from mapet.tokenizers.base import KTokenizer, Tokenizer
from mapet.tokenizers.kfeatures import KFeatures
from mapet.tokenizers.kpixels import KPixels

__all__ = [
    "CONFIG_FILE",
    "TOKENIZERS",
    "KFeatures",
    "KPixels",
    "KTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "save_tokenizer",
]

TOKENIZERS: dict[str, type[KTokenizer]] = {"pixels": KPixels, "features": KFeatures}

CONFIG_FILE, TENSOR_FILE = "tokenizer.json", "tokenizer.safetensors"


def save_tokenizer(tokenizer: KTokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer.safetensors`` into an existing folder."""
    save_file({name: tensor.contiguous() for name, tensor in tokenizer.state_dict().items()}, folder / TENSOR_FILE)
    content = {"kind": tokenizer.kind, "config": tokenizer.config, "hash": tokenizer.content_hash}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def load_tokenizer(folder: str | Path) -> KTokenizer:
    """Read a fitted tokenizer; its ids are those of the one that was saved.

    Raises:
        MapetError: if the folder holds no tokenizer, or its content does not match its hash.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / CONFIG_FILE).read_text())
        kind = content["kind"]
        if kind not in TOKENIZERS:
            raise MapetError(f"tokenizer {folder} is of unknown kind {kind!r}{nearest(kind, TOKENIZERS)}")
        tokenizer = TOKENIZERS[kind].from_config(content["config"])
        tokenizer.load_state_dict(load_file(folder / TENSOR_FILE))
        expected_hash = content["hash"]
    except FileNotFoundError as error:
        missing = error.filename or TENSOR_FILE  # safetensors does not name the file
        raise MapetError(f"{folder} holds no fitted tokenizer: {missing} is missing") from error
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise MapetError(f"tokenizer {folder} cannot be read ({error}); fit it again") from error
    if tokenizer.content_hash != expected_hash:
        raise MapetError(f"tokenizer {folder} was changed after fitting (its hash does not match); fit it again")
    return tokenizer.eval()
