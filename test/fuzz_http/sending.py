"""Sends requests as bytes, many at a time, and keeps what came of each."""

import http.client
import json
import queue
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .shots import Shot

# Longer than the transfer waits for a request whose other half never comes (45 s), and than the
# longest answer takes.
WAIT_S = 240.0
LEAVE_S = 0.3
MAX_ANSWER = 64 << 20
SHOWN = 300
KEPT_SLOW = 10


@dataclass(frozen=True)
class Answer:
    status: int  # 0: the connection ended without one
    words: str
    seconds: float
    hung: bool = False


def send(shot: Shot, ports: list[int]) -> list[Answer]:
    """The same to each port at once."""
    began = time.monotonic()
    sockets: list[socket.socket] = []
    found = []
    try:
        for port in ports:
            sockets.append(socket.create_connection(("127.0.0.1", port), timeout=WAIT_S))
        broken = [_write(shot, each) for each in sockets]
        if shot.leaves:
            # Either it is refused by now or nobody cares any more.
            select.select(sockets, [], [], LEAVE_S)
            return [Answer(0, "left", time.monotonic() - began)]
        for each, words in zip(sockets, broken, strict=True):
            found.append(_read(shot, each, began, words))
    except OSError as error:
        found.append(Answer(0, f"no connection: {error!r}", time.monotonic() - began))
    finally:
        for each in sockets:
            each.close()
    return found


def _write(shot: Shot, to: socket.socket) -> str:
    host, port = to.getpeername()
    try:
        to.sendall(shot.wire(f"{host}:{port}"))
    except OSError as error:  # an answer may lie there all the same
        return repr(error)
    return ""


def _read(shot: Shot, at: socket.socket, began: float, words: str) -> Answer:
    at.settimeout(max(1.0, WAIT_S - (time.monotonic() - began)))
    reply = http.client.HTTPResponse(at, method=shot.method)
    try:
        reply.begin()
        body = reply.read(MAX_ANSWER)
    except TimeoutError:
        return Answer(0, f"no end within {WAIT_S:g} s", time.monotonic() - began, hung=True)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(0, words or repr(error)[:SHOWN], time.monotonic() - began)
    text = body[:SHOWN].decode(errors="replace")
    return Answer(reply.status, text, time.monotonic() - began)


@dataclass
class Gun:
    """Takes shots in turn with `threads` threads. The journal has every one before it is sent."""

    ports: dict[str, list[int]]  # by target
    journal: Path
    threads: int = 6
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    errors: Counter[tuple[str, str, int, str]] = field(default_factory=Counter)
    hung: list[Shot] = field(default_factory=list)
    last: deque[tuple[float, Shot, list[Answer]]] = field(default_factory=lambda: deque(maxlen=200))
    open: dict[int, Shot] = field(default_factory=dict)  # by thread
    done: int = 0
    slow: list[tuple[float, str]] = field(default_factory=list)  # the slowest, slowest first
    stop: threading.Event = field(default_factory=threading.Event)

    def fire(self, shots: Iterable[Shot]) -> None:
        """Until there are no more, or `stop` is set. Raises what a thread has raised."""
        waiting: queue.Queue[Shot | None] = queue.Queue(maxsize=2 * self.threads)
        lock, raised = threading.Lock(), []

        def work(log: list[BaseException] = raised) -> None:
            try:
                while (shot := waiting.get()) is not None:
                    if not self.stop.is_set():
                        self._one(shot, lock, file)
            except BaseException as error:
                log.append(error)
                self.stop.set()
                while waiting.get() is not None:
                    pass

        with self.journal.open("a") as file:
            own = [threading.Thread(target=work, daemon=True) for _ in range(self.threads)]
            for each in own:
                each.start()
            for shot in shots:
                if self.stop.is_set():
                    break
                waiting.put(shot)
            for _ in own:
                waiting.put(None)
            for each in own:
                each.join()
        if raised:
            raise raised[0]

    def _one(self, shot: Shot, lock: threading.Lock, file: object) -> None:
        me = threading.get_ident()
        with lock:
            self.open[me] = shot
            print(_line(shot), file=file, flush=True)  # type: ignore[call-overload]
        answers = send(shot, self.ports[shot.target])
        with lock:
            del self.open[me]
            self.done += 1
            self.kinds[shot.kind] += 1
            self.last.append((time.monotonic(), shot, answers))
            for answer in answers:
                self.statuses[shot.target, answer.status] += 1
                self._note(shot, answer)
                if answer.hung:
                    self.hung.append(shot)
                if answer.status >= 500:
                    route = f"{shot.method} {shot.route}"
                    self.errors[shot.target, route, answer.status, answer.words[:160]] += 1

    def _note(self, shot: Shot, answer: Answer) -> None:
        if len(self.slow) < KEPT_SLOW or answer.seconds > self.slow[-1][0]:
            words = f"{answer.status} {answer.words[:160]} for {_line(shot)[:1000]}"
            self.slow = sorted([*self.slow, (round(answer.seconds, 1), words)], reverse=True)
            del self.slow[KEPT_SLOW:]

    def suspects(self, seconds: float = 5.0) -> list[str]:
        """What was open, or ended in the last few seconds without an answer."""
        now = time.monotonic()
        ended = [
            shot
            for at, shot, answers in list(self.last)
            if now - at < seconds and not all(0 < each.status < 500 for each in answers)
        ]
        return [_line(shot)[:2000] for shot in [*self.open.values(), *ended] if not shot.leaves]


def _line(shot: Shot) -> str:
    wire = shot.wire("host")
    said = {"target": shot.target, "kind": shot.kind, "wire": wire[:4000].decode("latin-1")}
    return json.dumps(said | ({"bytes": len(wire)} if len(wire) > 4000 else {}))
