"""Whatever parses what comes from the network, under atheris: `make fuzz-inputs`.

    python -m test.transfer.fuzz_inputs [RUNS] [SEED]

Coverage-guided, in this process. Anything but ValueError is a fault, and so is more memory than
MAX_GROWTH beyond what the imports take. libFuzzer writes an input that does it into crash-*.
"""

import argparse
import contextlib
import inspect
import itertools
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import atheris
import msgspec
import psutil
from sglang.srt.disaggregation.common.utils import pack_int_lists

from sglang_hma.kvcache import format as kv_format
from sglang_hma.kvcache.format import KVFormat
from sglang_hma.transfer import messages, request_fields, sglang_messages
from sglang_hma.transfer.decode import routes

RUNS, MAX_GROWTH, MAX_INPUT = 100_000, 64 << 20, 1 << 16
CUT = b"\n--\n"  # between frames
LAYOUT = KVFormat.bfp8(kv_heads=4, head_dim=64, v_head_dim=64, layers=2)
PEERS = request_fields.Peers(("10.0.0.1:8998",))

Frames = Sequence[bytes]


def json_of(frames: Frames) -> object:
    return msgspec.json.decode(frames[0])


def route(frames: Frames) -> None:
    given = json_of(frames)
    if isinstance(given, dict):
        with contextlib.suppress(ValueError):
            routes.parse_rank(given)
        routes.parse(given)


def fields(frames: Frames) -> None:
    given = json_of(frames)
    if isinstance(given, dict):
        names = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
        one = {name: given.get(name) for name in names}
        request = SimpleNamespace(**one, is_single=True)
        request_fields.refuse(request, PEERS, port=8998, may_fake=False)


TARGETS: tuple[Callable[[Frames], object], ...] = (
    lambda frames: messages.parse(list(frames)),
    lambda frames: messages.Introduction.parse(frames[0]),
    lambda frames: KVFormat.parse(frames[0].decode()),
    sglang_messages.registration,
    sglang_messages.page_list,
    sglang_messages.abort,
    sglang_messages.bootstrap,
    sglang_messages.abort_ack,
    lambda frames: sglang_messages.status(frames, waits=True),
    route,
    fields,
)


def one_input(data: bytes) -> None:
    if data:
        with contextlib.suppress(ValueError):
            TARGETS[data[0] % len(TARGETS)](data[1:].split(CUT))


def valid() -> list[tuple[int, Frames]]:
    host, session, words = b"10.0.0.2", b"10.0.0.2:15001", struct.pack("4Q", 1 << 40, 2, 3, 4)
    sizes, route_of = dict.fromkeys(("attn_tp_size", "attn_cp_size", "dp_size", "pp_size"), 1), {}
    route_of = sizes | {"page_size": 32, "kv_cache_dtype": "auto", "follow_bootstrap_room": True}
    asked = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 7}
    ours = (
        messages.Claim(7, "10.0.0.2", 5000),
        messages.Renewal([7], "::1", 5000),
        messages.Landed(7, 1, 0, 0, 1, 0, 2, [1, 2], 0),
        messages.Metadata(7, 1, 0, 2, 3),
        messages.Resend(7, 1, "10.0.0.2:15001", 0, 1, 0, 2, 1),
        messages.Landed(7, 1, 0, 0, 1, 0, 2, [1, 2], 0, kind=1),
        messages.Resend(7, 1, "10.0.0.2:15001", 0, 1, 0, 2, 1, kind=1),
        messages.Verified(7, 1, "10.0.0.2:15001"),
    )
    introduction = messages.Introduction(str(LAYOUT), [16], 8).frame()
    numbers = (b"0", b"1", b"8704")
    registration = [b"None", host, b"5000", session, words, words[:16], b"", *numbers]
    registration += [b""] * 6 + [b"1", b"0", b"", struct.pack("4Q", *[8704] * 4), introduction]
    pages = [b"7", host, b"5000", session, struct.pack("2i", 1, 2), b"0", b"", b"1", b"0", b""]
    # With a second pool, of layers with a window.
    windowed = [*registration]
    windowed[6] = pack_int_lists([[5 << 40, 6 << 40]], "Q")
    windowed[10] = pack_int_lists([[8704, 8704]], "I")
    window = [*pages[:6], pack_int_lists([[3, 4]], "i"), *pages[7:]]
    return [
        *((0, messages.frames(message)) for message in ours),
        (1, [introduction]),
        (2, [str(LAYOUT).encode()]),
        (3, registration),
        (3, windowed),
        (4, [*pages, b"5"]),
        (4, [*window, b"5"]),
        (5, [b"ABORT", b"7", host, b"5000", b"1"]),
        (6, [b"BOOTSTRAP", b"7", host, b"5000"]),
        (7, [b"ABORT_ACK", b"7", b"0", b"1"]),
        (8, [b"7", b"4", b"0", b"a reason"]),
        (9, [msgspec.json.encode(route_of)]),
        (10, [msgspec.json.encode(asked)]),
    ]


def instrument() -> None:
    """By hand: atheris knows no modules that an editable installation's loader brings."""
    for module in (kv_format, messages, request_fields, sglang_messages, routes):
        here = [
            one
            for one in vars(module).values()
            if getattr(one, "__module__", "") == module.__name__
        ]
        methods = [vars(one).values() for one in here if inspect.isclass(one)]
        for one in itertools.chain(here, *methods):
            function = inspect.unwrap(getattr(one, "__func__", one))
            if inspect.isfunction(function) and function.__code__.co_filename == module.__file__:
                atheris.instrument_func(function)


def report(runs: int, began_s: float) -> None:
    rate, memory = runs / (time.monotonic() - began_s), psutil.Process().memory_info().rss
    print(f"{rate:.0f} inputs a second, {memory >> 20} MB of memory at the end", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="?", type=int, default=RUNS)
    parser.add_argument(
        "seed", nargs="?", type=int, default=random.SystemRandom().randrange(1, 2**31)
    )
    given = parser.parse_args()
    instrument()
    for target, frames in valid():  # these are taken, or the corpus leads nowhere
        TARGETS[target](frames)
    with tempfile.TemporaryDirectory() as corpus:
        for number, (target, frames) in enumerate(valid()):
            Path(corpus, str(number)).write_bytes(bytes([target]) + CUT.join(frames))
        most = (psutil.Process().memory_info().rss + MAX_GROWTH) >> 20
        print(f"{given.runs} inputs, seed {given.seed}, at most {most} MB of memory", flush=True)
        options = {
            "runs": given.runs,
            "seed": given.seed,
            "max_len": MAX_INPUT,
            "rss_limit_mb": most,
            "timeout": 10,
            "print_final_stats": 1,
            "verbosity": 0,
        }
        flags = [f"-{name}={value}" for name, value in options.items()]
        began_s, counted = time.monotonic(), itertools.count(1)

        def one_more(data: bytes) -> None:
            one_input(data)
            if next(counted) == given.runs:  # libFuzzer ends the process
                report(given.runs, began_s)

        atheris.Setup([sys.argv[0], *flags, corpus], one_more)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
