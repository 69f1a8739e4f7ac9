"""What a pair exports is what is documented, and what dashboard, alerts and top read of it."""

import json

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from sglang_hma.top.__main__ import main

from ..test_monitoring import documented, exposed, used
from .client import payload
from .harness import Pair, Server, until

pytestmark = pytest.mark.e2e


def exported(url: str) -> dict[str, str]:
    """Series as they are scraped, with their types."""
    families = text_string_to_metric_families(requests.get(f"{url}/metrics").text)
    return {sample.name: family.type for family in families for sample in family.samples}


def stream(pair: Pair) -> None:
    body = payload(list(range(8, 108)), 4, stream=True)
    with requests.post(f"{pair.url}/generate", json=body, stream=True) as reply:
        assert reply.status_code == 200
        assert any(line.startswith(b"data:") for line in reply.iter_lines())


def test_every_series_that_is_read_is_there(pair: Pair) -> None:
    command = pair.router.command
    router = f"http://127.0.0.1:{command[command.index('--prometheus-port') + 1]}"
    found: dict[str, str] = {}

    def all_there() -> bool:
        """Some of SGLang's appear when its scheduler next adds up."""
        stream(pair)
        for url in (pair.prefill.url, pair.decode.url, router):
            found.update(exported(url))
        return not used() - found.keys()

    until(all_there, pair.prefill, pair.decode, pair.router)
    ours = {name: kind for name, kind in found.items() if name.startswith("sglang_hma:")}
    told = {name: kind for title, kind in documented().items() for name in exposed(title, kind)}
    assert ours == told


def test_both_roles_count_their_pages(pair: Pair) -> None:
    formats = {
        server.name: {labels for labels in server.metrics("sglang_hma:kv_pages_total")}
        for server in (pair.prefill, pair.decode)
    }
    assert formats == {
        pair.prefill.name: {'{format="bfp8"}'},
        pair.decode.name: {'{format="bfp8"}', '{format="bf16"}'},
    }

    def pages_used(server: Server) -> float:
        return server.metric("sglang_hma:kv_pages_used")

    # Decode gives pages back when a request ends; what prefill has cached stays.
    stream(pair)
    until(lambda: pages_used(pair.decode) == 0, pair.decode)
    until(lambda: pages_used(pair.prefill) >= 3, pair.prefill)


def test_a_single_server_counts_its_pages(single: Server) -> None:
    formats = set(single.metrics("sglang_hma:kv_pages_total"))
    assert formats == {'{format="bfp8"}', '{format="bf16"}'}
    assert single.metric("sglang_hma:start_time_seconds") > 0


def test_top_shows_a_pair_from_its_router(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    stream(pair)
    assert main([pair.url, "--once", "--json", "--interval", "0.1"]) == 0
    rows = json.loads(capsys.readouterr().out)["servers"]
    assert [(row["role"], row["url"]) for row in rows] == [
        ("prefill", pair.prefill.url),
        ("decode", pair.decode.url),
    ]
    prefill, decode = rows
    assert prefill["up_s"] > 0 and decode["up_s"] > 0
    assert prefill["pages"].keys() == {"bfp8"} and decode["pages"].keys() == {"bfp8", "bf16"}
    assert prefill["link_mb_s"] >= 0 and prefill["oldest_write_s"] >= 0
    assert decode["checksum_failures"] >= 0 and decode["quarantined_pages"] >= 0
    assert main([pair.url, "--once", "--interval", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("prefill", "decode", "bf16", "overlap"))
