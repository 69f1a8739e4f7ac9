"""A client's own logit processor takes effect on a pair, from the first token on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from .client import assert_drained, payload
from .conftest import COMMON
from .harness import Pair, Server, launch, running, running_pair

pytestmark = pytest.mark.e2e

FLAGS = (*COMMON, "--enable-custom-logit-processor")


@pytest.fixture(scope="module")
def servers(model: Path, logs: Path) -> Iterator[tuple[Pair, Server]]:
    alone = launch("processors-single", model, logs, *FLAGS)
    with running_pair(model, logs, *FLAGS, name="processors") as pair, running(alone):
        yield pair, alone


def test_a_processor(servers: tuple[Pair, Server]) -> None:
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    pair, alone = servers
    plain = requests.post(f"{alone.url}/generate", json=payload([5, 6, 7], 8)).json()["output_ids"]
    body = payload([5, 6, 7], 8)
    body["custom_logit_processor"] = DisallowedTokensLogitsProcessor.to_str()
    body["sampling_params"]["custom_params"] = {"token_ids": plain}
    expected, found = (
        requests.post(f"{url}/generate", json=body).json()["output_ids"]
        for url in (alone.url, pair.url)
    )
    assert found == expected and not set(found) & set(plain)
    assert_drained(pair.prefill, pair.decode, alone)


def test_hidden_states_are_refused_by_name(servers: tuple[Pair, Server]) -> None:
    body = payload([5, 6, 7], 2) | {"return_hidden_states": True}
    reply = requests.post(f"{servers[0].url}/generate", json=body)
    assert reply.status_code == 400 and "return_hidden_states" in reply.text
