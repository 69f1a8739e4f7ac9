"""Output into a pipe that nobody reads."""

import os
import re
from collections.abc import Iterator
from typing import TextIO

import pytest

from sglang_hma.launch.output import Unblocked

LINE = f"{'x' * 99}\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as out:
        yield reader, out
    os.close(reader)


def read_lines(reader: int, last: str) -> list[str]:
    data = b""
    while last.encode() not in data:
        data += os.read(reader, 1 << 16)
    return data.decode().splitlines()


def test_a_full_pipe_holds_nobody_up_and_what_was_left_out_is_said(
    pipe: tuple[int, TextIO],
) -> None:
    reader, out = pipe
    stream = Unblocked(out, max_waiting=1 << 16)
    for _ in range(10_000):
        stream.write(LINE)
    assert not stream.finish(0.01)
    kept = said = 0
    rest = b""
    while kept + said < 10_000:
        *lines, rest = (rest + os.read(reader, 1 << 16)).split(b"\n")
        for line in map(bytes.decode, lines):
            lost = re.fullmatch(r"sglang-hma: (\d+) lines left out, for nobody read them", line)
            assert lost or line == LINE.strip()
            kept, said = kept + (not lost), said + (int(lost[1]) if lost else 0)
    assert kept + said == 10_000 and said > 0 and not rest
    stream.write("on it goes\n")
    assert read_lines(reader, "goes\n") == ["on it goes"]
    assert stream.finish(600)


def test_all_comes_in_order_where_somebody_reads(pipe: tuple[int, TextIO]) -> None:
    reader, out = pipe
    os.set_blocking(out.fileno(), False)
    stream = Unblocked(out)
    wanted = [f"line {i}" for i in range(5000)]
    for line in wanted:
        stream.write(f"{line}\n")
    assert read_lines(reader, "line 4999\n") == wanted
    assert stream.finish(600)


def test_a_reader_that_is_gone_takes_all() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        stream = Unblocked(out)
        stream.write(LINE)
        assert stream.finish(600)
        stream.write(LINE)
        assert stream.finish(600)
