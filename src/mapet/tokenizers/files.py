"""Tokenizers as folders: ``tokenizer.json`` and ``tokenizer.safetensors``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mapet.errors import MapetError, nearest
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.dvae import DVAE
from mapet.tokenizers.kfeatures import KFeatures
from mapet.tokenizers.kpixels import KPixels
from mapet.tokenizers.vqkd import VQKD

TOKENIZERS: dict[str, type[Tokenizer]] = {"pixels": KPixels, "features": KFeatures, "vqkd": VQKD, "dvae": DVAE}

# Tokenizers that others trained, by name; they take where the weights are, or None for the published ones.
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


def holds_tokenizer(name: str | Path) -> bool:
    """Whether it is the folder of a tokenizer, or of a run that made one."""
    return _home(name) is not None


def _home(name: str | Path) -> Path | None:
    # os.path, not pathlib: false, not an error, for a name that no file can have.
    found = (folder for folder in (Path(name), Path(name) / "tokenizer") if os.path.isfile(folder / CONFIG_FILE))  # noqa: PTH113
    return next(found, None)


def load_tokenizer(name: str | Path, weights: str | None = None) -> Tokenizer:
    """Read a fitted tokenizer, or get a published one; its ids are those of the one that was saved.

    Args:
        name: the folder of a tokenizer, or of a run that made one; or a name in ``PUBLISHED``.
        weights: of a published one: a file, a URL or ``hf-hub:OWNER/REPO/FILE``; None for where its authors keep them.

    Raises:
        MapetError: if the folder holds no tokenizer, its content does not match its hash, or weights cannot be had.
    """
    if name in PUBLISHED:
        return PUBLISHED[str(name)](weights).eval()
    if weights is not None:
        raise MapetError(f"tokenizer {name} has its own weights; leave --teacher-weights out")
    folder = _home(name) or Path(name)
    try:
        content = json.loads((folder / CONFIG_FILE).read_text())
        kind = content["kind"]
        if kind not in TOKENIZERS:
            raise MapetError(f"tokenizer {folder} is of unknown kind {kind!r}{nearest(kind, TOKENIZERS)}")
        tokenizer = TOKENIZERS[kind].from_config(content["config"])
        tokenizer.load_state_dict(load_file(folder / TENSOR_FILE))
        tokenizer.origin = content["origin"]
        expected_hash = content["hash"]
    except FileNotFoundError as error:
        missing = error.filename or TENSOR_FILE  # safetensors does not name the file
        raise MapetError(
            f"{folder} holds no fitted tokenizer: {missing} is missing; fit one with: mapet tokenizer fit"
        ) from error
    except KeyError as error:
        raise MapetError(
            f"tokenizer {folder} lacks the entry {error}, so it has another format; fit it again"
        ) from error
    except (OSError, ArithmeticError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MapetError(f"tokenizer {folder} cannot be read ({reason}); fit it again") from error
    if tokenizer.content_hash != expected_hash:
        raise MapetError(f"tokenizer {folder} was changed after fitting (its hash does not match); fit it again")
    return tokenizer.eval()
