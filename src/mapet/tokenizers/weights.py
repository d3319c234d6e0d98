"""Weights of other people's networks: fetched from a file, a URL or the hub, identified, read as tensors only."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

import timm
import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from mapet.errors import MapetError

logger = logging.getLogger(__name__)

STALLED_S = 60.0  # a server that sends nothing for so long is given up


def fetch_weights(source: str | Path) -> tuple[Path, dict[str, str]]:
    """Return the local path of a weights file and its ``origin``: where from, and the SHA-256 of its bytes.

    Args:
        source: a file, an ``https://`` or ``http://`` URL, or ``hf-hub:OWNER/REPOSITORY/FILE``; what is downloaded is
            kept in torch's or the hub's cache. ``#sha256=HEX`` at its end says what the file must be.

    Raises:
        MapetError: if it cannot be had, or is another file than ``#sha256=`` says.
    """
    where, asked, expected = str(source).partition("#sha256=")
    path = Path(where)
    if remote := where.startswith(("https://", "http://")):
        path = _download(where)
    elif remote := where.startswith("hf-hub:"):
        path = _from_hub(where)
    elif not os.path.isfile(where):  # noqa: PTH113 (false, not an error, for a name that no file can have)
        raise MapetError(f"weights {where} do not exist or are no file; pass a file, a URL or hf-hub:OWNER/REPO/FILE")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MapetError(f"weights {where} cannot be read ({error})") from error
    if asked and found != expected.lower():
        # Not deleted here: the digest may be what is wrong.
        remedy = f"; if the digest is right, delete {path} to fetch it again" if remote else ""
        raise MapetError(
            f"weights {where} have the SHA-256 {found}, not {expected}: it is another file, or damaged{remedy}"
        )
    return path, {"weights": where, "sha256": found}


def _download(url: str) -> Path:
    # Two URLs may end in the same name.
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{url.partition('?')[0].rpartition('/')[2]}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    logger.info("downloading %s to %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as folder:  # other processes may be fetching it too
            partial = Path(folder) / name
            request = Request(url, headers={"User-Agent": "mapet"})
            with urlopen(request, timeout=STALLED_S) as response, partial.open("wb") as file:
                shutil.copyfileobj(response, file)
                announced, size = response.headers["Content-Length"], file.tell()
            if announced is not None and size != int(announced):  # urllib takes a broken connection for the end
                raise OSError(f"the connection broke after {size} of {announced} bytes")
            partial.replace(path)
    except (OSError, ValueError, HTTPException) as error:
        raise MapetError(f"weights {url} could not be downloaded ({error}); pass a local file") from error
    return path


def _from_hub(where: str) -> Path:
    parts = where.removeprefix("hf-hub:").split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise MapetError(f"weights {where!r} name no file; write hf-hub:OWNER/REPOSITORY/FILE")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2]))
    except Exception as error:  # also those of the hub's HTTP library, which differs between its versions
        reason = " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__
        raise MapetError(f"weights {where} could not be fetched ({reason}); pass a local file") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors or torch file of weights; a dictionary under ``model`` or ``state_dict`` is unwrapped.

    Nothing in it is executed (``weights_only``). Besides tensors and plain containers timm lets only an
    ``argparse.Namespace`` through, which BEiT's, MAE's and its own checkpoints keep beside the tensors: making one
    stores attributes and calls nothing.

    Raises:
        MapetError: if it is damaged, or holds more than that.
    """
    try:
        content: Mapping[str, Any] = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # a damaged pickle may fail in any way
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise MapetError(
            f"weights {path} cannot be read as tensors ({reason}); pass a state dict, as torch or safetensors saves it"
        ) from error
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str | Path, what: str) -> None:
    """Refuse weights that lack a tensor of ``wanted`` or have it in another shape.

    Args:
        found, wanted: tensors by name.
        path: of the file, for the message.
        what: they should fit, for the message.
    """
    missing = [name for name in wanted if name not in found]
    wrong = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    if missing or wrong:
        first = (
            f"{missing[0]!r} is missing"
            if missing
            else f"{wrong[0]!r} has shape {tuple(found[wrong[0]].shape)} instead of {tuple(wanted[wrong[0]].shape)}"
        )
        raise MapetError(
            f"weights {path} do not fit {what}: {first} ({len(missing)} missing, {len(wrong)} of wrong shape of "
            f"{len(wanted)})"
        )
