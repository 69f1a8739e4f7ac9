"""503 with Retry-After for whoever comes to a port whose server is about to end."""

import json
import math
import socket
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

PATIENCE_S = 5.0
READ_AT_MOST, CHUNK = 64 << 20, 1 << 16
BODY = {
    "error": {
        "message": "the service is stopping: requests that run may finish, new ones may not start",
        "type": "service_unavailable",
        "code": 503,
    }
}


class ClosedPort:
    """Listens on host:port once it is free; `retry_after` gives seconds from now."""

    def __init__(self, host: str, port: int, retry_after: Callable[[], float]) -> None:
        self._address, self._retry_after = (host, port), retry_after
        self._server: socketserver.ThreadingTCPServer | None = None

    def try_to_open(self) -> bool:
        """Whether it is open. Not as long as another process listens there."""
        if self._server is None:
            try:
                self._server = _server(self._address, _handler(self._retry_after))
            except OSError:
                return False
            threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return True

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def _server(
    address: tuple[str, int], handler: type[BaseHTTPRequestHandler]
) -> socketserver.ThreadingTCPServer:
    family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]

    class Server(socketserver.ThreadingTCPServer):
        address_family = family
        allow_reuse_address = True
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that goes away is no news."""

    return Server(address, handler)


def _handler(retry_after: Callable[[], float]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE_S

        def refuse(self) -> None:
            # A reply to a request that was not read may never be seen: the connection is reset.
            length = self.headers.get("Content-Length", "0")
            left = min(int(length), READ_AT_MOST) if length.isdecimal() else 0
            while left > 0 and (read := self.rfile.read(min(left, CHUNK))):
                left -= len(read)
            body = json.dumps(BODY).encode()
            self.send_response(503)
            self.send_header("Retry-After", str(max(1, math.ceil(retry_after()))))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = refuse

        def log_message(self, format: str, *values: object) -> None:
            """Nobody reads it."""

    return Handler
