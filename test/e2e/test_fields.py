"""No field of a request is ignored on a pair that takes effect on one server."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmark.contract.compare import OTHER, SAME, Row, compared
from benchmark.contract.fields import APIS, WITHOUT_EFFECT, Api, declared

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
    assert row.outcome != OTHER, row.detail
    assert row.outcome != SAME or name in WITHOUT_EFFECT


def test_nothing_is_left(pair: Pair, single: Server) -> None:
    if file := os.environ.get("HMA_CONTRACT_JSON"):
        Path(file).write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    assert_drained(pair.prefill, pair.decode, single)
