"""Proof over HTTP that a message comes from a holder of a key, is meant for this use, and is new.

A seal is HMAC-SHA256 over what the message is for, when it was made, a number used once, and its
content. What takes seals remembers those of the last two minutes and takes none twice.
"""

import hmac
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable

# Clocks of two hosts may differ by so much.
TOLERANCE_S = 60.0
MAX_REMEMBERED = 1 << 18  # seals; more in two minutes is no decode server
MAX_SEAL = 160  # characters


def _mac(key: bytes, *parts: bytes) -> str:
    """Every part with its length before it, so that no two lists of parts are one message."""
    message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hmac.digest(key, message, "sha256").hex()


def seal(key: bytes, purpose: str, content: bytes) -> str:
    """`time/number/mac`, to go with `content`."""
    made = f"{time.time():.3f}/{secrets.token_hex(16)}"
    return f"{made}/{_mac(key, purpose.encode(), made.encode(), content)}"


def answer_seal(key: bytes, question: str, *parts: bytes) -> str:
    """Goes with an answer to what was asked with the seal `question`, and with nothing else."""
    return _mac(key, b"answer", question.encode(), *parts)


def is_answer(key: bytes, question: str, given: str | None, *parts: bytes) -> bool:
    """Whether `given` is the answer_seal of these parts."""
    expected = answer_seal(key, question, *parts)
    return given is not None and hmac.compare_digest(
        given.encode(errors="replace"), expected.encode()
    )


class Seals:
    """Checks seals made with one key. Safe to use from several threads."""

    def __init__(self, key: bytes, *, clock: Callable[[], float] = time.time) -> None:
        self._key = key
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._by_age: deque[tuple[float, str]] = deque()  # when it may be forgotten, and the number

    def check(
        self, purpose: str, content: bytes, given: str | None, *, again: bool = False
    ) -> None:
        """Raises ValueError, in words that a stranger may read, unless `given` is a new seal of
        `content` for `purpose`. `again`: it may have been seen before."""
        if not given:
            raise ValueError("no seal comes with it")
        made, _, mac = given.rpartition("/")
        expected = _mac(self._key, purpose.encode(), made.encode(), content)
        if len(given) > MAX_SEAL or not hmac.compare_digest(mac.encode(), expected.encode()):
            raise ValueError("its seal is made with another key, or of something else")
        # From here on a holder of the key has written it.
        text, _, number = made.partition("/")
        now = self._clock()
        off_s = float(text) - now
        if abs(off_s) > TOLERANCE_S:
            raise ValueError(
                f"its clock differs from this host's by {off_s:+.0f} s, more than {TOLERANCE_S:.0f}"
            )
        if again:
            return
        with self._lock:
            while self._by_age and self._by_age[0][0] < now:
                self._seen.discard(self._by_age.popleft()[1])
            if number in self._seen:
                raise ValueError("it was said before")
            if len(self._seen) >= MAX_REMEMBERED:
                raise ValueError("too much was said within two minutes")
            self._seen.add(number)
            self._by_age.append((now + 2 * TOLERANCE_S, number))
