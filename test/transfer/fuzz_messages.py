"""Mutated control messages over real sockets to real managers: `make fuzz-messages`.

    python -m test.transfer.fuzz_messages [MESSAGES] [SEED]

Each is a message that a role really takes, with a few frames changed. At the end every thread
lives, a request goes its way, and memory has grown by less than MAX_GROWTH.
"""

import argparse
import random
import struct
from collections.abc import Callable, Iterator, Sequence

import psutil
from sglang.srt.disaggregation.common.utils import pack_int_lists

from sglang_hma.transfer import messages

from .real_managers import HOST, Pair, push_and_settle, real_pair

MESSAGES, BATCH = 10_000, 250
MAX_GROWTH = 64 << 20
EDGES = (0, 1, 2, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**57, 2**63 - 1, 2**64 - 1, -1)
TAGS = (
    *messages.TYPES,
    *(b"None", b"ABORT", b"ABORT_ACK", b"BOOTSTRAP", b"WATERMARK", b"STAGING_RSP"),
    *(b"STAGING_REQ", b"CHUNK_READY", b"AUX_DATA", b"77"),
)


def valid(pair: Pair, rng: random.Random) -> list[bytes]:
    """Some message of either role, for a request that nobody has."""
    room, host, port = rng.randrange(2**60, 2**62), HOST, pair.decode.rank_port
    name, session = str(room).encode(), pair.decode.get_session_id()
    pages = [rng.randrange(16) for _ in range(rng.randrange(1, 6))]
    return rng.choice(
        (
            pair.decode.build_receiver_registration_message(),
            [
                *(name, host.encode(), str(port).encode(), session.encode()),
                *(struct.pack(f"{len(pages)}i", *pages), b"0", b"", b"1", b"0", b"", b"7"),
            ],
            [b"ABORT", name, host.encode(), str(port).encode(), b"1"],
            [b"ABORT_ACK", name, b"0", b"1"],
            [name, str(rng.randrange(6)).encode(), b"0", b"a reason"],
            messages.frames(messages.Claim(room, host, port)),
            messages.frames(messages.Renewal([room], host, port)),
            messages.frames(messages.Landed(room, 1, 0, 0, 1, 0, 2, [1, 2], 0)),
            messages.frames(messages.Resend(room, 1, session, 0, 1, 0, 2, 1)),
            messages.frames(messages.Landed(room, 1, 0, 0, 1, 0, 2, [1, 2], 0, kind=1)),
            messages.frames(messages.Resend(room, 1, session, 0, 1, 0, 2, 1, kind=1)),
            [  # with pages of a window, which goes with a second pool
                *(name, host.encode(), str(port).encode(), session.encode()),
                *(struct.pack(f"{len(pages)}i", *pages), b"0", pack_int_lists([pages], "i")),
                *(b"1", b"0", b"", b"7"),
            ],
            messages.frames(messages.Verified(room, 1, session)),
        )
    )


def mutated(message: Sequence[bytes], rng: random.Random) -> list[bytes]:
    changed = list(message)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 8))):
        index = rng.randrange(len(changed)) if changed else 0
        rng.choice(CHANGES)(changed, index, rng)
    return changed


def _set(frame: Callable[[bytes, random.Random], bytes]) -> Callable[..., None]:
    def change(message: list[bytes], index: int, rng: random.Random) -> None:
        if message:
            message[index] = frame(message[index], rng)

    return change


def _flip(frame: bytes, rng: random.Random) -> bytes:
    if not frame:
        return rng.randbytes(1)
    place = rng.randrange(len(frame))
    return frame[:place] + bytes([frame[place] ^ 1 << rng.randrange(8)]) + frame[place + 1 :]


def _edge(frame: bytes, rng: random.Random) -> bytes:
    number = rng.choice(EDGES)
    codes = [code for code, bits in (("I", 32), ("Q", 64)) if 0 <= number < 1 << bits]
    packed = [struct.pack(f"<{code}", number) for code in codes]
    return rng.choice([str(number).encode(), *packed, *(frame + one for one in packed)])


CHANGES: tuple[Callable[..., None], ...] = (
    _set(_flip),
    _set(_edge),
    _set(lambda frame, rng: frame[: rng.randrange(len(frame) + 1)]),
    _set(lambda frame, rng: frame + rng.randbytes(rng.randrange(1, 40))),
    _set(lambda frame, rng: rng.randbytes(rng.choice((0, 1, 4, 8, 100, 10_000)))),
    _set(lambda frame, rng: frame * rng.randrange(2, 40)),
    lambda message, index, rng: message.__delitem__(slice(index, index + 1)),
    lambda message, index, rng: message.insert(index, rng.choice(TAGS)),
    lambda message, index, rng: message.__setitem__(slice(0, 1), [rng.choice(TAGS)]),
    lambda message, index, rng: rng.shuffle(message),
)


def stream(pair: Pair, count: int, rng: random.Random) -> Iterator[list[bytes]]:
    for _ in range(count):
        yield mutated(valid(pair, rng), rng) or [b""]


def fuzz(pair: Pair, count: int, seed: int) -> int:
    """Returns by how many bytes this process has grown. Raises AssertionError when a thread has
    ended or a request does not arrive."""
    rng = random.Random(seed)
    pair.check()
    before = psutil.Process().memory_info().rss
    for start in range(0, count, BATCH):
        batch = list(stream(pair, min(BATCH, count - start), rng))
        for role in ("prefill", "decode"):
            push_and_settle(pair, role, *batch)
        pair.check()
    return int(psutil.Process().memory_info().rss - before)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("count", nargs="?", type=int, default=MESSAGES)
    parser.add_argument("seed", nargs="?", type=int, default=random.SystemRandom().randrange(2**32))
    count, seed = vars(parser.parse_args()).values()
    print(f"{count} messages to each role, seed {seed}", flush=True)
    with real_pair() as pair:
        grown = fuzz(pair, count, seed)
        print(f"every thread lives, requests arrive, {grown >> 20} MiB more memory")
        assert grown < MAX_GROWTH, f"more than {MAX_GROWTH >> 20} MiB"


if __name__ == "__main__":
    main()
