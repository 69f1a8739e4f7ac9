"""What the router sees of a cluster: Kubernetes' API, as far as it lists and watches pods, and
servers that answer as SGLang's do."""

import contextlib
import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

from .documents import Document


@contextlib.contextmanager
def listening(
    handler: type[BaseHTTPRequestHandler], host: str, port: int = 0
) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer((host, port), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *values: object) -> None:
        """Nobody reads it."""


@dataclass
class Api:
    """Pods of one namespace, `set` by a test; whoever watches is told of each change."""

    namespace: str
    pods: dict[str, Document] = field(default_factory=dict)
    watchers: list["queue.Queue[Document]"] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    version: int = 1

    def set(self, pod: Document) -> None:
        with self.lock:
            self.version += 1
            name = pod["metadata"]["name"]
            pod["metadata"]["resourceVersion"] = str(self.version)
            kind = "MODIFIED" if name in self.pods else "ADDED"
            self.pods[name] = pod
            for each in self.watchers:
                each.put({"type": kind, "object": pod})

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        """The URL of the API server."""
        with listening(self._handler(), "127.0.0.1") as server:
            yield f"http://127.0.0.1:{server.server_address[1]}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        api = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                url = urlparse(self.path)
                if url.path != f"/api/v1/namespaces/{api.namespace}/pods":
                    self.send_error(403)
                elif parse_qs(url.query).get("watch") == ["true"]:
                    self._watch()
                else:
                    with api.lock:
                        kind = {"kind": "PodList", "apiVersion": "v1"}
                        about = {"resourceVersion": str(api.version)}
                        self.reply({**kind, "metadata": about, "items": list(api.pods.values())})

            def _watch(self) -> None:
                events: queue.Queue[Document] = queue.Queue()
                with api.lock:
                    api.watchers.append(events)
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                with contextlib.suppress(OSError):
                    while True:
                        line = json.dumps(events.get()).encode() + b"\n"
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                        self.wfile.flush()

        return Handler


@dataclass
class StandInServer:
    """Healthy; keeps the bodies of the requests that it gets."""

    asked: list[Document] = field(default_factory=list)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        asked = self.asked

        class Handler(Quiet):
            def do_GET(self) -> None:
                self.reply({"status": "alive", "model_path": "m", "served_model_name": "m"})

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", "0"))
                asked.append(json.loads(self.rfile.read(length)))
                self.reply({"text": "!", "output_ids": [5], "meta_info": {"id": "1"}})

        return Handler
