"""Weights trained by others: read from a file, a URL or the Hugging Face hub, and identified by their SHA-256."""

import hashlib
import logging
import shutil
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

import torch
from huggingface_hub import hf_hub_download

from mapet.errors import MapetError

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0  # a download fails if the server sends nothing for so long


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
        reason = " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__
        raise MapetError(f"weights {where} could not be fetched ({reason}); pass a local file") from error
