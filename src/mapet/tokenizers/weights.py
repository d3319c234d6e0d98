"""Weights of other people's networks: fetched from a file, a URL or the hub, and identified."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

import torch
from huggingface_hub import hf_hub_download

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
