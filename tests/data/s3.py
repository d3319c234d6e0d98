"""An S3 server on loopback, and a proxy before it that fails in ways that networks do."""

import http.client
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from moto.server import ThreadedMotoServer

from mapet.data.stores import _client

BUCKET = "photos"


class FaultProxy(ThreadingHTTPServer):
    """Forwards requests to a server; reads of objects meet ``faults`` in turn, then none, or always ``fault``.

    - "cut": the connection ends in the middle of the body.
    - "503": the server is too busy.
    - "dribble": the body comes byte by byte.
    - "stall": one byte of the body comes, then nothing until the client gives up.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.faults, self.fault, self.reads = port, deque[str](), "", 0
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def _forward(self) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        length = int(self.headers.get("Content-Length", 0))
        upstream.request(self.command, self.path, self.rfile.read(length), dict(self.headers))
        response = upstream.getresponse()
        body = response.read()
        upstream.close()
        fault = ""
        if self.command == "GET" and self.headers.get("Range"):
            self.server.reads += 1
            fault = self.server.faults.popleft() if self.server.faults else self.server.fault
        if fault == "503":
            self.send_error(503, "Slow Down")
            return
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", response.headers.get("Content-Length") or str(len(body)))
        self.end_headers()
        if fault == "dribble":
            for byte in body:
                self.wfile.write(bytes([byte]))
        elif fault in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2 if fault == "cut" else 1])
            if fault == "stall":
                self.connection.recv(1)  # returns when the client hangs up
            self.close_connection = True
        else:
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def s3_server(environment: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """An empty bucket; clients find it through the environment, which processes that they start inherit."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = FaultProxy(server.get_host_and_port()[1])
    for name, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_TIMEOUT": "1s",
    }.items():
        environment.setenv(name, value)
    _client.cache_clear()
    for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{BUCKET}")):  # servers of a process share buckets
        connection = http.client.HTTPConnection("127.0.0.1", proxy.upstream)
        connection.request(method, path)
        assert connection.getresponse().status == 200
        connection.close()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()
