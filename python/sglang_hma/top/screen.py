"""A table of rows, for a terminal, and the same as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from sglang_hma.top.reading import Reading
from sglang_hma.top.watch import Row, Silent

NOTHING = "-"
LEFT = ("role", "server", "up")
RIGHT = (
    *("running", "queued", "tokens/s", "TTFT s\np50 p90 p99", "TPOT ms\np50 p90 p99"),
    *("pages\nused/total", "link\nMB/s", "overlap", "checksum\nfailures", "oldest\nwrite s"),
)
CAPTION = "of the last {window:g} s; TTFT and TPOT of streamed requests"


def table(rows: Sequence[Row], window_s: float) -> Table:
    made = Table(
        box=box.SIMPLE_HEAD, caption=CAPTION.format(window=window_s), caption_justify="left"
    )
    for name in LEFT:
        made.add_column(name, vertical="middle")
    for name in RIGHT:
        made.add_column(name, justify="right", vertical="middle")
    for row in rows:
        if isinstance(row, Silent):
            made.add_row(Text("?", "red"), _plain(_short(row.url)), Text("silent", "red"))
        else:
            made.add_row(*map(_plain, _cells(row)))
    return made


def reasons(rows: Sequence[Row]) -> list[Text]:
    """A line for each server that told nothing."""
    return [_plain(f"{row.url}: {row.reason}", "red") for row in rows if isinstance(row, Silent)]


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _cells(row: Reading) -> list[str]:
    tokens = {"prefill": row.prefill_tokens_s, "decode": row.decode_tokens_s}
    both = f"{row.prefill_tokens_s:.0f} in, {row.decode_tokens_s:.0f} out"
    pages = [f"{name} {used}/{total}" for name, (used, total) in row.pages.items()]
    return [
        row.role,
        _short(row.url),
        NOTHING if row.up_s is None else _time(row.up_s),
        f"{row.running:.0f}",
        f"{row.queued:.0f}",
        f"{tokens[row.role]:.0f}" if row.role in tokens else both,
        _percentiles(row.ttft_s, 1.0, 2),
        _percentiles(row.tpot_s, 1e3, 0),
        "\n".join(pages) or NOTHING,
        NOTHING if row.link_mb_s is None else f"{row.link_mb_s:.1f}",
        NOTHING if row.overlap is None else f"{row.overlap:.0%}",
        NOTHING if row.checksum_failures is None else str(row.checksum_failures),
        NOTHING if row.oldest_write_s is None else f"{row.oldest_write_s:.1f}",
    ]


def _short(url: str) -> str:
    return url.removeprefix("http://")


def _percentiles(values: tuple[float, ...] | None, scale: float, digits: int) -> str:
    return NOTHING if values is None else " ".join(f"{v * scale:.{digits}f}" for v in values)


def _time(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _plain(text: str, style: str = "") -> Text:
    """What servers send must not move the cursor."""
    return Text("".join(c if c.isprintable() or c == "\n" else "?" for c in text), style)
