"""Gauges are read beside the loops that they are about, and shown by another process."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, multiprocess

from sglang_hma.gauges import PREFIX, Gauges


class Server:
    waiting, lost = 3.0, 0.0


def shown(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(PREFIX + name, labels)


def test_what_is_read_is_shown_as_long_as_its_owner_lives() -> None:
    gauges, server = Gauges(), Server()
    gauges.gauge("test_waiting", "x", server, lambda one: one.waiting)
    gauges.gauge("test_pages", "x", server, lambda one: one.waiting * 2, format="bfp8")
    gauges.read_all()
    assert (shown("test_waiting"), shown("test_pages", format="bfp8")) == (3, 6)
    server.waiting = 5.0
    assert shown("test_waiting") == 3  # nothing is set between two readings
    gauges.read_all()
    assert (shown("test_waiting"), shown("test_pages", format="bfp8")) == (5, 10)
    del server
    gc.collect()
    gauges.read_all()
    assert not gauges._watched


def test_a_total_is_counted_once() -> None:
    gauges, server = Gauges(), Server()
    gauges.counter("test_lost", "x", server, lambda one: one.lost)
    for total in (2.0, 2.0, 7.0):
        server.lost = total
        gauges.read_all()
    assert shown("test_lost_total") == 7


def test_what_cannot_be_read_stops_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    def fails(server: Server) -> float:
        if server.lost:
            raise ValueError("changed under way")
        return 1.0

    gauges, server = Gauges(), Server()
    gauges.gauge("test_fails", "x", server, fails)
    gauges.gauge("test_beside", "x", server, lambda one: one.waiting)
    server.lost = 1.0
    for _ in range(3):
        gauges.read_all()
    assert shown("test_beside") == 3
    assert [record.getMessage() for record in caplog.records] == [
        "sglang_hma:test_fails cannot be read"
    ]
    server.lost = 0.0
    gauges.read_all()
    assert shown("test_fails") == 1


RANK = """
import sys
from sglang_hma.gauges import GAUGES

class Rank:
    pages = float(sys.argv[1])

rank = Rank()
GAUGES.gauge("test_rank_pages", "x", rank, lambda one: one.pages)
GAUGES.counter("test_rank_lost", "x", rank, lambda one: one.pages)
GAUGES.start()
GAUGES.start()
GAUGES.read_all()
GAUGES._thread.is_alive() or sys.exit("ended")
"""


def test_another_process_shows_the_largest_of_the_ranks(tmp_path: Path) -> None:
    for pages in ("4", "9", "2"):
        env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", RANK, pages], env=env, check=True)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    assert registry.get_sample_value(f"{PREFIX}test_rank_pages") == 9
    # A rank's own thread may have counted before the main one did, but not twice.
    assert registry.get_sample_value(f"{PREFIX}test_rank_lost_total") == 15
    assert (registry.get_sample_value(f"{PREFIX}start_time_seconds") or 0) > 1e9


def test_there_is_no_thread_without_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    gauges = Gauges()
    gauges.start()
    assert gauges._thread is None
