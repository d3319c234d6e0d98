"""Weights made by others: fetched, read without running code in them, and compared with the tensors that are wanted."""

import argparse
import hashlib
import logging
import re
import shutil
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

import safetensors.torch
import timm
import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from mapet.errors import MapetError, reason_of

logger = logging.getLogger(__name__)

# Keys under which authors store the state dict, the most common first.
NESTED = ("state_dict", "model", "module")
# Types that become float32 by their values alone; others have a scale or an imaginary part.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TIMEOUT_S = 60.0  # a download fails if the server sends nothing for so long

State = Mapping[str, Tensor]  # tensors by name


def fetch_tensors(source: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a weights file and its ``origin``; see ``fetch_weights`` and ``read_tensors``."""
    path, origin = fetch_weights(source)
    return read_tensors(path), origin


def fetch_weights(source: str | Path) -> tuple[Path, dict[str, str]]:
    """Return the local path of a weights file, and its ``origin``: the source, and the SHA-256 of its bytes.

    Args:
        source: a file, an ``https://`` or ``http://`` URL, or ``hf-hub:OWNER/REPOSITORY/FILE``, perhaps followed by
            ``#sha256=HEX``, the expected digest. Downloads are kept in the cache of torch or of the hub.

    Raises:
        MapetError: if the file cannot be read or downloaded, or its digest is not the expected one.
    """
    where, has_digest, expected = str(source).partition("#sha256=")
    path, remedy = Path(where), ""
    if where.startswith(("https://", "http://", "hf-hub:")):
        path = _from_hub(where) if where.startswith("hf-hub:") else _download(where)
        # Not deleted here: the expected digest may be what is wrong.
        remedy = f"; if the digest is right, delete {path} to fetch it again"
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise MapetError(
            f"weights {where} cannot be read ({error}); pass a file, a URL or hf-hub:OWNER/REPOSITORY/FILE"
        ) from error
    if has_digest and found != expected.lower():
        raise MapetError(
            f"weights {where} have the SHA-256 {found}, not {expected}: it is another file, or damaged{remedy}"
        )
    return path, {"weights": where, "sha256": found}


def _download(url: str) -> Path:
    # The hash keeps URLs apart whose file names are the same.
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{url.partition('?')[0].rpartition('/')[2]}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    logger.info("downloading %s to %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as folder:  # other processes may download the same file
            partial = Path(folder) / name
            request = Request(url, headers={"User-Agent": "mapet"})
            with urlopen(request, timeout=TIMEOUT_S) as response, partial.open("wb") as file:
                shutil.copyfileobj(response, file)
                announced, size = response.headers["Content-Length"], file.tell()
            if announced is not None and size != int(announced):  # copyfileobj ends silently when a connection breaks
                raise OSError(f"the connection broke after {size} of {announced} bytes")
            partial.replace(path)
    except (OSError, ValueError, HTTPException) as error:
        raise MapetError(f"weights {url} could not be downloaded ({error}); pass a local file") from error
    return path


def _from_hub(where: str) -> Path:
    owner, _, rest = where.removeprefix("hf-hub:").partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise MapetError(f"weights {where!r} name no file; write hf-hub:OWNER/REPOSITORY/FILE")
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except Exception as error:  # the HTTP library's errors differ between versions of huggingface_hub
        raise MapetError(
            f"weights {where} could not be fetched ({reason_of(error).rstrip('.')}); pass a local file"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a file written by ``torch.save``, by name; see ``flatten_state``.

    No code in the file is run: besides tensors, numbers and plain containers only ``argparse.Namespace`` is accepted,
    which the files of MAE, BEiT and timm hold beside the weights.

    Raises:
        MapetError: if the file is missing or damaged, needs other Python objects, or holds no state dict.
    """
    if not path.is_file():
        raise MapetError(f"weights {path} do not exist or are no file; pass the path of a downloaded file")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises errors of many types
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            reason = f"they need the Python object {foreign[1]}, and loading that might run code"
            advice = "save the state dict alone, if you trust the file"
        else:
            reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
            advice = "the file may be cut short or no checkpoint, pass a state dict as torch or safetensors saves it"
        raise MapetError(f"weights {path} cannot be read as tensors: {reason}; {advice}") from error
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise MapetError(f"weights {path} hold a {kind}, not a state dict; pass a state dict as torch saves it")
    return flatten_state(content, str(path))


def flatten_state(content: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's state dict by their plain names, and log the names of all other entries.

    A dictionary under ``state_dict``, ``model`` or ``module`` is unwrapped, and the prefixes ``module.`` and
    ``_orig_mod.`` are removed.

    Args:
        content: of the checkpoint.
        source: of the checkpoint, for the log.
    """
    others: list[str] = []
    for key in NESTED:
        nested = content.get(key)
        if isinstance(nested, Mapping):
            others += [str(name) for name in content if name != key]
            content = nested
    plain: dict[str, Any] = timm.models.clean_state_dict({str(name): value for name, value in content.items()})
    others += [name for name, value in plain.items() if not isinstance(value, Tensor)]
    if others:
        logger.info("%s: entries besides the weights are not used: %s", source, ", ".join(sorted(others)))
    return {name: value for name, value in plain.items() if isinstance(value, Tensor)}


def check_fit(found: State, wanted: State, source: str | Path, what: str, prefixes: tuple[str, ...] = ()) -> None:
    """Check that ``found`` has each tensor of ``wanted``, of the same shape, and of floats where floats are wanted.

    Args:
        found, wanted: tensors by name.
        source: of the found tensors, for the message.
        what: the network that the tensors must fit, for the message.
        prefixes: of names; a found tensor whose name begins with one of them must be wanted.

    Raises:
        MapetError: naming the first tensor that does not fit.
    """
    problems = []
    for name, tensor in wanted.items():
        if name not in found:
            problems.append(f"{name!r} is missing")
        elif found[name].shape != tensor.shape:
            problems.append(f"{name!r} has shape {tuple(found[name].shape)} instead of {tuple(tensor.shape)}")
        elif tensor.is_floating_point() and found[name].dtype not in FLOATS:
            problems.append(f"{name!r} is of type {found[name].dtype}, not of plain floats")
    problems += [f"{name!r} is unknown" for name in found if name.startswith(prefixes) and name not in wanted]
    if problems:
        raise MapetError(
            f"the weights of {source} do not fit {what}: {problems[0]} ({len(problems)} such tensors, {len(wanted)} "
            "wanted); pass the weights of that network"
        )
