"""A search that is ended and asked again."""

import random
from pathlib import Path

import pytest

from benchmark.planner.fleets import boxes, pair
from sglang_hma.planner.goodput import Goodput, Objectives
from sglang_hma.planner.journal import Journal, JournalError, key_of
from sglang_hma.planner.search import Question, ask, ask_each
from sglang_hma.planner.systems import Offer
from sglang_hma.planner.trace import Request


@pytest.fixture
def question(seed: int) -> Question:
    rng = random.Random(seed)
    requests = [Request(float(i), rng.randrange(100, 1000), 11) for i in range(60)]
    return Question(requests, Objectives(2.0, 0.05), seeds=1)


def offers(*widths: int) -> list[Offer]:
    fleets = [pair(prefill_instances=n) for n in widths]
    return [
        Offer("ours", n, 1, fleet, 1e4, 1e4, 1e3, ())
        for n, fleet in zip(widths, fleets, strict=True)
    ]


def test_the_rest_is_asked_and_nothing_twice(
    tmp_path: Path, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(question, offers(1, 2, 3), processes=1)
    file = tmp_path / "search"
    ask(question, offers(1, 3), processes=1, journal=Journal(file))
    asked = []
    whole = Question.ask

    def counted(self: Question, offer: Offer) -> Goodput:
        asked.append(offer.prefill)
        return whole(self, offer)

    monkeypatch.setattr(Question, "ask", counted)
    assert ask(question, offers(1, 2, 3), processes=1, journal=Journal(file)) == expected
    assert asked == [2]
    other = Question(question.requests, Objectives(1.0, 0.05), seeds=1)
    ask(other, offers(1), processes=1, journal=Journal(file))
    assert asked == [2, 1]


def test_several_questions_side_by_side(tmp_path: Path, question: Question) -> None:
    other = Question(question.requests[:20], Objectives(1.0, 0.05), seeds=1)
    asked = list(zip([question, other, question], offers(1, 1, 2), strict=True))
    expected = [ask(each, [offer], processes=1)[0] for each, offer in asked]
    file = tmp_path / "search"
    ask_each(asked[:2], processes=1, journal=Journal(file))
    assert ask_each(asked, processes=2, journal=Journal(file)) == expected


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "search"
    answers = [Goodput(float(n), 0.5, (float(n),), 1.0) for n in range(3)]
    journal = Journal(file)
    for n, answer in enumerate(answers):
        journal.put(str(n), answer)
    text = file.read_bytes()
    last = text.rindex(b"\n", 0, -1) + 1
    file.write_bytes(text[: last + kept])
    again = Journal(file)
    assert [again.get(str(n)) for n in range(3)] == [answers[0], answers[1], None]
    again.put("2", answers[2])
    assert Journal(file).get("2") == answers[2]


def test_no_journal(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("timestamp_ms,input_length,output_length\n0,1,1\n")
    with pytest.raises(JournalError, match=r"trace\.csv:1: no line of a search"):
        Journal(file)
    assert file.read_text().startswith("timestamp_ms")
    with pytest.raises(JournalError, match="nowhere"):
        Journal(tmp_path / "nowhere" / "search")


def test_fleets_differ() -> None:
    fleets = [pair(), pair(layers=5), pair(prefill_instances=2), boxes(), boxes(mixed=True)]
    assert len({key_of("", fleet) for fleet in fleets}) == len(fleets)
