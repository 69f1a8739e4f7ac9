"""Seals of HTTP messages: taken once, from who has the key, for what they were made for."""

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.transfer import seals
from sglang_hma.transfer.seals import TOLERANCE_S, Seals, answer_seal, is_answer, seal

KEY = secrets.token_bytes(32)


class Clock:
    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return seals.time.time() + self.ahead_s


@given(st.text(max_size=40), st.binary(max_size=200))
def test_a_seal_is_taken_once(purpose: str, content: bytes) -> None:
    checks = Seals(KEY)
    made = seal(KEY, purpose, content)
    checks.check(purpose, content, made)
    with pytest.raises(ValueError, match="said before"):
        checks.check(purpose, content, made)
    checks.check(purpose, content, made, again=True)


@given(
    st.sampled_from(["GET /route", "POST /x"]),
    st.binary(max_size=20),
    st.integers(0, 300),
    st.integers(0, 0x10FFFF).map(lambda n: chr(n)),
)
def test_whatever_is_changed_is_noticed(
    purpose: str, content: bytes, place: int, letter: str
) -> None:
    made = seal(KEY, purpose, content)
    at = place % len(made)
    changed = made[:at] + letter + made[at + 1 :]
    if changed != made:
        with pytest.raises(ValueError, match=r"^[a-z' ]"):
            Seals(KEY).check(purpose, content, changed)
    for wrong in ((purpose + "?", content), (purpose, content + b"\0"), (purpose[:-1], content)):
        with pytest.raises(ValueError, match="another key, or of something else"):
            Seals(KEY).check(*wrong, made)
    with pytest.raises(ValueError, match="another key"):
        Seals(bytes(32)).check(purpose, content, made)


@given(st.text(max_size=400))
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="seal"):
        Seals(KEY).check("GET /route", b"", text)


@pytest.mark.parametrize("ahead_s", [-TOLERANCE_S - 5, TOLERANCE_S + 5])
def test_clocks_agree(ahead_s: float) -> None:
    clock = Clock()
    checks = Seals(KEY, clock=clock)
    clock.ahead_s = ahead_s
    with pytest.raises(ValueError, match="clock differs"):
        checks.check("p", b"", seal(KEY, "p", b""))


def test_it_is_refused_as_long_as_its_time_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    checks = Seals(KEY, clock=clock)
    clock.ahead_s = -TOLERANCE_S + 1  # this host's clock is late
    made = seal(KEY, "p", b"")
    checks.check("p", b"", made)
    for ahead_s in (0.0, TOLERANCE_S - 1, TOLERANCE_S + 10):
        clock.ahead_s = ahead_s
        with pytest.raises(ValueError, match=r"said before|clock"):
            checks.check("p", b"", made)
    clock.ahead_s = 10 * TOLERANCE_S
    monkeypatch.setattr(seals.time, "time", lambda: 1e9)
    later = seal(KEY, "p", b"")
    monkeypatch.undo()
    Seals(KEY, clock=lambda: 1e9).check("p", b"", later)


def test_memory_of_what_was_said_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "MAX_REMEMBERED", 8)
    clock = Clock()
    checks = Seals(KEY, clock=clock)
    for _ in range(8):
        checks.check("p", b"", seal(KEY, "p", b""))
    with pytest.raises(ValueError, match="too much"):
        checks.check("p", b"", seal(KEY, "p", b""))
    clock.ahead_s = 2 * TOLERANCE_S + 1
    monkeypatch.setattr(seals, "TOLERANCE_S", 1e9)
    checks.check("p", b"", seal(KEY, "p", b""))
    assert len(checks._seen) == len(checks._by_age) == 1


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
def test_answers_go_with_their_question(parts: list[bytes], others: list[bytes]) -> None:
    made = answer_seal(KEY, "q", *parts)
    assert is_answer(KEY, "q", made, *parts)
    assert is_answer(KEY, "q", made, *others) == (parts == others)
    assert not is_answer(KEY, "r", made, *parts)
    assert not is_answer(KEY, "q", None, *parts)
    assert not is_answer(bytes(32), "q", made, *parts)
