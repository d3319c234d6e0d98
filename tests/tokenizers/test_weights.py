from __future__ import annotations

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
from mapet.models.tensors import read_tensors
from mapet.tokenizers.weights import fetch_weights

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


class Server(ThreadingHTTPServer):
    """Serves ``files`` by path; those whose name begins with ``cut`` only by half."""

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
    """A real server, and an empty cache for what comes from it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "cache"))
    with Server() as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
    torch.hub.set_dir(before)


def bytes_of(tensors: Any, folder: Path) -> bytes:
    torch.save(tensors, folder / "of.pth")
    return (folder / "of.pth").read_bytes()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] = TENSORS) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_file_is_identified(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    for source in (
        tmp_path / "w.pth",
        f"{tmp_path}/w.pth#sha256={digest}",
        f"{tmp_path}/w.pth#sha256={digest.upper()}",
    ):
        assert fetch_weights(source) == (tmp_path / "w.pth", {"weights": f"{tmp_path}/w.pth", "sha256": digest})
    with pytest.raises(MapetError, match=f"w.pth have the SHA-256 {digest}, not 00: it is another file, or damaged$"):
        fetch_weights(f"{tmp_path}/w.pth#sha256=00")
    for name in ("none.pth", "", "x" * 5000):
        with pytest.raises(MapetError, match="do not exist or are no file; pass a file, a URL or hf-hub:"):
            fetch_weights(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="needs a file that even root cannot read")
def test_an_unreadable_file_is_named() -> None:
    with pytest.raises(MapetError, match="weights /proc/self/mem cannot be read .*Errno"):
        fetch_weights("/proc/self/mem")


def test_a_url_is_downloaded_once(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.files["/x/w.pth"] = bytes_of(TENSORS, tmp_path)
    server.files["/y/w.pth"] = bytes_of({"c": torch.zeros(1)}, tmp_path)
    url = f"{server.url}/x/w.pth?download=true"
    with caplog.at_level(logging.INFO, "mapet"):
        path, origin = fetch_weights(url)
    assert f"downloading {url}" in caplog.text
    assert origin == {"weights": url, "sha256": hashlib.sha256(server.files["/x/w.pth"]).hexdigest()}
    assert same(read_tensors(path)[0])
    assert path.is_relative_to(tmp_path / "cache")
    assert fetch_weights(url) == (path, origin)
    assert server.requests == ["GET /x/w.pth?download=true"]
    other = fetch_weights(f"{server.url}/y/w.pth")[0]
    assert read_tensors(other)[0].keys() == {"c"}, "two URLs that end in the same name must not share a file"
    assert read_tensors(path)[0].keys() == {"a", "b"}


def test_safetensors_of_a_url_are_known_by_their_name(server: Server, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w.safetensors")
    server.files["/w.safetensors"] = (tmp_path / "w.safetensors").read_bytes()
    assert same(read_tensors(fetch_weights(f"{server.url}/w.safetensors?download=true")[0])[0])


def test_another_download_than_expected_is_refused_and_can_be_got_rid_of(server: Server) -> None:
    server.files["/w.pth"] = b"damaged"
    right = hashlib.sha256(b"right").hexdigest()
    url = f"{server.url}/w.pth#sha256={right}"
    with pytest.raises(
        MapetError, match=rf"not {right}: it is another file.* delete .*w.pth to fetch it again"
    ) as error:
        fetch_weights(url)
    server.files["/w.pth"] = b"right"
    with pytest.raises(MapetError, match="another file"):
        fetch_weights(url)  # still the old one
    Path(str(error.value).rpartition("delete ")[2].removesuffix(" to fetch it again")).unlink()
    path, origin = fetch_weights(url)
    assert path.read_bytes() == b"right"
    assert origin == {"weights": f"{server.url}/w.pth", "sha256": right}


def test_broken_downloads_are_named_and_not_kept(server: Server, tmp_path: Path) -> None:
    server.files["/cut.pth"] = b"weights!"
    with pytest.raises(
        MapetError, match="cut.pth could not be downloaded .*broke after 4 of 8 bytes.*pass a local file"
    ):
        fetch_weights(f"{server.url}/cut.pth")
    with pytest.raises(MapetError, match="none.pth could not be downloaded .*404"):
        fetch_weights(f"{server.url}/none.pth")
    with pytest.raises(MapetError, match="could not be downloaded"):
        fetch_weights(f"{server.url}/a name.pth")
    with pytest.raises(MapetError, match="could not be downloaded .*refused"):
        fetch_weights("http://127.0.0.1:1/w.pth")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    (tmp_path / "file").touch()
    torch.hub.set_dir(str(tmp_path / "file"))
    with pytest.raises(MapetError, match="could not be downloaded"):
        fetch_weights(f"{server.url}/cut.pth")


@pytest.fixture
def hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server as the hub, and an empty cache; as HF_ENDPOINT and HF_HOME set them, but those are read at import."""
    settings = huggingface_hub.constants
    template = settings.HUGGINGFACE_CO_URL_TEMPLATE.replace(settings.ENDPOINT, server.url)
    monkeypatch.setattr(settings, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(settings, "ENDPOINT", server.url)
    monkeypatch.setattr(settings, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's retries
    return server


def test_a_file_of_the_hub_is_downloaded_once(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = hub.files["/some/model/resolve/main/sub/w.bin"] = bytes_of(TENSORS, tmp_path)
    source, digest = "hf-hub:some/model/sub/w.bin", hashlib.sha256(content).hexdigest()
    path, origin = fetch_weights(source)
    assert origin == {"weights": source, "sha256": digest}
    assert same(read_tensors(path)[0])
    assert path.is_relative_to(tmp_path / "hub")
    assert fetch_weights(source) == (path, origin)
    assert hub.requests.count("GET /some/model/resolve/main/sub/w.bin") == 1
    with pytest.raises(MapetError, match="to fetch it again"):
        fetch_weights(f"{source}#sha256=00")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch_weights(source) == (path, origin)


def test_what_the_hub_does_not_give_is_named(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["/some/model/resolve/main/cut.bin"] = bytes_of(TENSORS, tmp_path)
    with pytest.raises(MapetError, match=r"weights hf-hub:some/model/none.bin could not be fetched \(404 .*Not Found"):
        fetch_weights("hf-hub:some/model/none.bin")
    # An error of the hub's HTTP library, which is none of Python's.
    with pytest.raises(MapetError, match=r"cut.bin could not be fetched \(.*closed connection.*\); pass a local file$"):
        fetch_weights("hf-hub:some/model/cut.bin")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MapetError, match=r"cut.bin could not be fetched \(.*\); pass a local file$"):
        fetch_weights("hf-hub:some/model/cut.bin")


@pytest.mark.parametrize("name", ["hf-hub:model", "hf-hub:some/model", "hf-hub:some/model/", "hf-hub:/model/w.bin"])
def test_hub_names_without_a_file_are_refused(name: str) -> None:
    with pytest.raises(MapetError, match=f"'{name}' name no file; write hf-hub:OWNER/REPOSITORY/FILE"):
        fetch_weights(name)
