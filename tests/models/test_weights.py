import hashlib
import logging
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from mapet import MapetError
from mapet.models.tensors import fetch_tensors, fetch_weights

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


class Server(ThreadingHTTPServer):
    """Serves ``files`` by path, but only half of a file whose name begins with ``cut``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {self.path}")
        content = self.server.files.get(name)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")  # the hub's words
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)  # the hub's client asks for it
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if Path(name).name.startswith("cut") else content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server, also in place of the hub, and empty caches; HF_ENDPOINT and HF_HOME are read at import."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the retries of the hub's client
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    settings = huggingface_hub.constants
    with Server() as server:
        template = settings.HUGGINGFACE_CO_URL_TEMPLATE.replace(settings.ENDPOINT, server.url)
        changes = {"HUGGINGFACE_CO_URL_TEMPLATE": template, "ENDPOINT": server.url, "HF_HUB_OFFLINE": False}
        for name, value in {**changes, "HF_HUB_CACHE": str(tmp_path / "hub")}.items():
            monkeypatch.setattr(settings, name, value)
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_files_are_identified_by_their_digest(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    for suffix in ("", f"#sha256={digest}", f"#sha256={digest.upper()}"):
        found = fetch_weights(f"{tmp_path}/w.pth{suffix}")
        assert found == (tmp_path / "w.pth", {"weights": f"{tmp_path}/w.pth", "sha256": digest})
    with pytest.raises(MapetError, match=f"w.pth have the SHA-256 {digest}, not 00: it is another file, or damaged$"):
        fetch_weights(f"{tmp_path}/w.pth#sha256=00")
    for name in ("none.pth", "", "x" * 5000, "a\0b"):
        with pytest.raises(MapetError, match="cannot be read .*; pass a file, a URL or hf-hub:"):
            fetch_weights(tmp_path / name)


def test_files_are_downloaded_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(TENSORS, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    url, of_hub = f"{server.url}/x/w.safetensors?download=true", "hf-hub:some/model/sub/w.safetensors"
    for source, place, cache in (
        (url, "/x/w.safetensors", "cache"),
        (of_hub, "/some/model/resolve/main/sub/w.safetensors", "hub"),
    ):
        server.files[place] = content
        with caplog.at_level(logging.INFO, "mapet"):
            path, origin = fetch_weights(source)
        assert origin == {"weights": source, "sha256": hashlib.sha256(content).hexdigest()}
        assert path.is_relative_to(tmp_path / cache)
        assert fetch_weights(source) == (path, origin)
        assert sum(request.startswith(f"GET {place}") for request in server.requests) == 1
        with pytest.raises(MapetError, match=f"not 00: it is another file.* delete {path} to fetch it again"):
            fetch_weights(f"{source}#sha256=00")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        tensors, from_cache = fetch_tensors(source)
        assert (tensors.keys(), from_cache) == (TENSORS.keys(), origin)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert f"downloading {url}" in caplog.text
    server.files["/y/w.safetensors"] = b"of the same name"
    assert fetch_weights(f"{server.url}/y/w.safetensors")[0].read_bytes() == b"of the same name"


def test_broken_downloads_are_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    server.files["/cut.pth"] = b"weights!"
    for url, reason in (
        (f"{server.url}/cut.pth", "broke after 4 of 8 bytes"),
        (f"{server.url}/none.pth", "404"),
        (f"{server.url}/a name.pth", ""),
        ("http://127.0.0.1:1/w.pth", "refused"),
    ):
        with pytest.raises(MapetError, match=f"could not be downloaded .*{reason}.*pass a local file"):
            fetch_weights(url)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_files_that_the_hub_does_not_give_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hf-hub:model", "hf-hub:some/model", "hf-hub:some/model/", "hf-hub:/model/w.bin"):
        with pytest.raises(MapetError, match=f"'{name}' name no file; write hf-hub:OWNER/REPOSITORY/FILE"):
            fetch_weights(name)
    server.files["/some/model/resolve/main/cut.bin"] = b"weights!"
    for file, reason in (("none.bin", "404 .*Not Found"), ("cut.bin", "closed connection"), ("cut.bin", "")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", not reason)
        with pytest.raises(MapetError, match=rf"{file} could not be fetched \(.*{reason}.*\); pass a local file$"):
            fetch_weights(f"hf-hub:some/model/{file}")
