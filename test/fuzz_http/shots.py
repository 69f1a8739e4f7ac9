"""Requests as bytes: drawn by schemathesis from a schema, laid over good ones, and bent."""

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.schemas import APIOperation

from .routes import GENERATING, GOOD, POSITIVE_ONLY, Schema, Target

Headers = tuple[tuple[str, str], ...]
JSON = (("Content-Type", "application/json"),)
EDGES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 255, 2**15, 2**16, 5000, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1),
    *(2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 0.0, -0.5, 0.5, 1.5, 1e38, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), True, False, None, "", "0", "x", "\ud800", "\0"),
    *(
        "x" * 5000,
        "\U0001f600" * 50,
        "../../etc/passwd",
        "(a+)+$",
        [],
        {},
        [[]],
        [None],
        [0] * 3000,
    ),
    *([-1], [2**40], [2**70], [1.5], ["x"], [[1, 2], [3]], {"": {}}, {"x": 1}, {"99999999": 1}),
)


@dataclass(frozen=True)
class Shot:
    """One request, still without the address of its target."""

    target: Target
    kind: str
    method: str
    route: str  # as the schema has it
    path: str
    headers: Headers = ()
    body: bytes = b""
    raw: bytes | None = None  # all of it, where it is no HTTP
    leaves: bool = False  # the client sends it and goes

    def wire(self, host: str) -> bytes:
        if self.raw is not None:
            return self.raw
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: {host}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if not any(
            name.lower() in ("content-length", "transfer-encoding") for name, _ in self.headers
        ):
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + self.body


def drawn(operation: APIOperation, mode: GenerationMode, count: int, number: int) -> list[Any]:
    """Schemathesis's cases. The same number gives the same ones."""
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def take(case: Any) -> None:
        found.append(case)

    try:
        take()
    except Unsatisfiable:  # what has no fields has no wrong ones
        return []
    return found


def as_shot(target: Target, case: Any, mode: GenerationMode) -> Shot | None:
    """None where `requests` refuses it."""
    asked = case.as_transport_kwargs("http://host")
    names = ("method", "url", "headers", "params", "data", "json", "files", "cookies")
    try:
        made = requests.Request(**{name: asked.get(name) for name in names}).prepare()
    except (requests.RequestException, ValueError, TypeError):
        return None
    body = made.body or b""
    own = {"host", "connection", "content-length", "x-schemathesis-testcaseid", "accept-encoding"}
    return Shot(
        target,
        mode.value,
        str(made.method),
        case.operation.path,
        made.path_url,
        tuple((k, _text(v)) for k, v in made.headers.items() if k.lower() not in own),
        body.encode(errors="replace") if isinstance(body, str) else body,
    )


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


class Maker:
    """Of one schema: its cases, and what is made of them."""

    def __init__(self, schema: Schema, count: int, number: int) -> None:
        self.rng = random.Random(number)
        loaded = schemathesis.openapi.from_dict(schema)
        self.cases: dict[tuple[str, str], list[tuple[Any, GenerationMode]]] = {}
        operations = [one.ok() for one in loaded.get_all_operations()]
        for one in operations:
            found: list[tuple[Any, GenerationMode]] = []
            each = count * 4 if one.path in GENERATING else count
            for mode in GenerationMode:
                if mode.is_positive or one.path not in POSITIVE_ONLY:
                    found += [(case, mode) for case in drawn(one, mode, each, number)]
            self.cases[one.path, one.method.upper()] = found

    def shot(self, target: Target, only: frozenset[str] | None, generating: float) -> Shot:
        """To one of the routes `only`; with the chance `generating` to one that generates."""
        keys = [key for key in self.cases if only is None or key[0] in only]
        if self.rng.random() < generating:
            keys = [key for key in keys if key[0] in GENERATING] or keys
        while True:
            path, method = self.rng.choice(keys)
            found = self.cases[path, method]
            if not found:
                continue
            case, mode = self.rng.choice(found)
            shot = as_shot(target, case, mode)
            if shot is None:
                continue
            if path in GOOD:
                kind = self.rng.choice(
                    ("as it is", "overlay", "overlay", "edges", "edges", "edges")
                )
                if kind == "overlay" and isinstance(case.body, dict):
                    shot = self._overlay(shot, case.body)
                elif kind == "edges":
                    shot = self._edges(shot)
            return bent(shot, self.rng) if self.rng.random() < 0.15 else shot

    def _overlay(self, shot: Shot, drawn_body: dict[str, Any]) -> Shot:
        """A good request with a few of the drawn fields."""
        body = json.loads(json.dumps(GOOD[shot.route]))
        for name in self.rng.sample(sorted(drawn_body), min(len(drawn_body), 3)):
            given = drawn_body[name]
            if isinstance(given, dict) and isinstance(body.get(name), dict):
                few = self.rng.sample(sorted(given), min(len(given), 2))
                body[name] |= {each: given[each] for each in few}
            else:
                body[name] = given
        return replace(shot, kind=f"{shot.kind} over good", headers=JSON, body=dumped(body))

    def _edges(self, shot: Shot) -> Shot:
        """A good request with one or two fields, which need not be in it, at an edge."""
        body = json.loads(json.dumps(GOOD[shot.route]))
        for _ in range(self.rng.choice((1, 1, 2))):
            place = body
            names = self._fields(shot)
            if isinstance(body.get("sampling_params"), dict) and self.rng.random() < 0.5:
                place, names = body["sampling_params"], self._sampling()
            place[self.rng.choice(sorted({*names, *place}))] = self.rng.choice(EDGES)
        return replace(shot, kind="edge", headers=JSON, body=dumped(body))

    def _fields(self, shot: Shot) -> set[str]:
        """Names of fields that schemathesis has given in any case of this route."""
        return {
            name
            for case, _ in self.cases[shot.route, shot.method]
            if isinstance(case.body, dict)
            for name in case.body
            if name.isidentifier()
        }

    def _sampling(self) -> set[str]:
        return {
            name
            for case, _ in self.cases["/generate", "POST"]
            if isinstance(case.body, dict) and isinstance(case.body.get("sampling_params"), dict)
            for name in case.body["sampling_params"]
            if name.isidentifier()
        }


def dumped(body: Any) -> bytes:
    """JSON as Python writes it, NaN too."""
    try:
        return json.dumps(body, default=str).encode()
    except (ValueError, RecursionError):
        return b"{}"


def with_room(shot: Shot, port: int, room: int) -> Shot:
    """As SGLang's router sends it to both halves; as it is if its body is no object."""
    try:
        body = json.loads(shot.body)
    except (ValueError, RecursionError):
        return shot
    if not isinstance(body, dict):
        return shot
    ours = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": room}
    return replace(shot, body=dumped(body | ours))


def bent(shot: Shot, rng: random.Random) -> Shot:
    """No longer what any schema has, and at times no HTTP."""
    name, change = rng.choice(BENDS)
    return replace(change(shot, rng), kind=name)


def _flip(shot: Shot, rng: random.Random) -> Shot:
    body = bytearray(shot.body or b"{}")
    for _ in range(rng.choice((1, 2, 8))):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return replace(shot, body=bytes(body))


def _spliced(inside: Callable[[random.Random], bytes]) -> Callable[[Shot, random.Random], Shot]:
    """Puts JSON that Python would not write before a body's last bracket."""

    def change(shot: Shot, rng: random.Random) -> Shot:
        start = shot.body[:-1] if shot.body.startswith(b"{") and len(shot.body) > 2 else b'{"a":1'
        name = rng.choice((b"x", b"text", b"prompt", b"rid", b"n", b"sampling_params"))
        return replace(shot, headers=JSON, body=start + b',"' + name + b'":' + inside(rng) + b"}")

    return change


def _header(shot: Shot, rng: random.Random) -> Shot:
    name = "".join(rng.choices(string.ascii_letters + "-_", k=rng.choice((1, 8, 200))))
    value = rng.choice(("x" * 60_000, "x" * 9000, "\x80\xff", "", "\x01", "a,b;c=1", "0" * 300))
    more = tuple((f"{name}-{i}", value) for i in range(rng.choice((1, 1, 90))))
    return replace(shot, headers=shot.headers + more)


def _length(shot: Shot, rng: random.Random) -> Shot:
    given = rng.choice(("-1", "x", "1e3", "0", "99999999999999999999", str(len(shot.body) + 9)))
    return replace(shot, headers=(*shot.headers, ("Content-Length", given)), leaves=True)


def _chunks(shot: Shot, rng: random.Random) -> Shot:
    size = rng.choice((b"%x" % len(shot.body), b"zz", b"-1", b"ffffffffffffffff", b""))
    body = size + b"\r\n" + shot.body + b"\r\n" + rng.choice((b"0\r\n\r\n", b"", b"1\r\n"))
    return replace(
        shot, headers=(*shot.headers, ("Transfer-Encoding", "chunked")), body=body, leaves=True
    )


def _noise(shot: Shot, rng: random.Random) -> Shot:
    wire = bytearray(shot.wire("host"))
    for _ in range(rng.choice((1, 5, 50))):
        wire[rng.randrange(min(len(wire), 200))] = rng.randrange(256)
    return replace(shot, raw=bytes(wire), leaves=True)


def _cut(shot: Shot, rng: random.Random) -> Shot:
    return replace(shot, body=shot.body[: rng.randrange(len(shot.body) + 1)])


def _other_type(shot: Shot, rng: random.Random) -> Shot:
    given = rng.choice(("text/plain", "multipart/form-data", "application/xml", "a/b/c", ""))
    return replace(shot, headers=(("Content-Type", given),))


def _method(shot: Shot, rng: random.Random) -> Shot:
    others = ("PATCH", "DELETE", "TRACE", "OPTIONS", "HEAD", "GET", "PUT", "QUERY")
    return replace(shot, method=rng.choice(others))


def _open(rng: random.Random) -> bytes:
    return rng.choice((b"[", b'{"a":')) * rng.choice((200, 5000, 100_000))


def _closed(rng: random.Random) -> bytes:
    depth = rng.choice((200, 900, 5000, 100_000))
    return b"[" * depth + b"]" * depth


def _number(rng: random.Random) -> bytes:
    return rng.choice((b"9", b"-9", b"1e", b"0.")) + b"9" * rng.choice((5, 25, 400, 50_000))


NOT_NUMBERS = (b"NaN", b"Infinity", b"-Infinity", b"nan")
NOT_UTF8 = (b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\\ud800"', b'"\xc0\x80"')

BENDS: tuple[tuple[str, Callable[[Shot, random.Random], Shot]], ...] = (
    ("flipped bytes", _flip),
    ("cut body", _cut),
    ("other content type", _other_type),
    ("deep JSON", _spliced(_open)),
    ("deep closed JSON", _spliced(_closed)),
    ("large number", _spliced(_number)),
    ("NaN", _spliced(lambda rng: rng.choice(NOT_NUMBERS))),
    ("invalid UTF-8", _spliced(lambda rng: rng.choice(NOT_UTF8))),
    ("long string", _spliced(lambda rng: b'"' + b"long " * rng.choice((2000, 50_000)) + b'"')),
    ("header", _header),
    ("content length", _length),
    ("chunks", _chunks),
    ("noise", _noise),
    ("another method", _method),
    (
        "long path",
        lambda shot, rng: replace(shot, path=f"{shot.path}/{'%00a' * rng.choice((1, 20_000))}"),
    ),
    ("leaves", lambda shot, rng: replace(shot, leaves=True)),
)
