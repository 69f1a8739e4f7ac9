"""No field of a request is ignored on a pair that takes effect on one server."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmark.contract.compare import OTHER, Row, compared
from benchmark.contract.fields import APIS, Api, declared

from .client import assert_drained
from .harness import Pair, Server

pytestmark = pytest.mark.e2e

CASES = [(api, name) for api in APIS for name in api.cases]
found: list[Row] = []


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.name)
def test_every_field_has_a_case(api: Api) -> None:
    assert set(api.cases) == declared()[api.name]


@pytest.mark.parametrize(("api", "name"), CASES, ids=[f"{api.name}-{name}" for api, name in CASES])
def test_field(pair: Pair, single: Server, api: Api, name: str) -> None:
    row = compared(api, name, single.url, pair.url)
    found.append(row)
    print(f"ROW {json.dumps(asdict(row))}")
    assert row.outcome != OTHER, row.detail


def test_nothing_is_left(pair: Pair, single: Server) -> None:
    Path("/tmp/rows.json").write_text(json.dumps([asdict(row) for row in found], indent=1))
    assert_drained(pair.prefill, pair.decode, single)
