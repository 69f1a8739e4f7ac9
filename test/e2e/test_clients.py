"""The clients people use, against the router."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmark.serving import gpu_trace
from sglang_hma.launch.operator_routes import NEEDS

from ..warm_python import WarmPython
from .client import output_ids, payload
from .harness import Pair, Server

pytestmark = pytest.mark.e2e


Bench = Callable[..., dict]


@pytest.fixture
def bench(python: WarmPython, pair: Pair, model: Path, tmp_path: Path) -> Bench:
    def run(*args: str) -> dict:
        out = tmp_path / "bench.jsonl"
        flags = ["--backend", "sglang", "--base-url", pair.url, "--model", str(model)]
        flags += ["--pd-separated", "--output-file", str(out), "--disable-tqdm", *args]
        done = python("-m", "sglang.bench_serving", *flags)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return dict(json.loads(out.read_text().splitlines()[-1]))

    return run


def test_bench_serving_random_ids(bench: Bench) -> None:
    args = ["--dataset-name", "random-ids", "--num-prompts", "12", "--random-input-len", "100"]
    result = bench(*args, "--random-output-len", "16")
    assert result["completed"] == 12


def test_what_the_planner_records_can_be_fitted(
    python: WarmPython, pair: Pair, tmp_path: Path
) -> None:
    file = tmp_path / "runs.jsonl"
    flags = ["--url", pair.url, "--lengths", "40:6", "300:9", "--requests", "8"]
    for how in (["--alone"], ["--rate", "20"]):
        done = python("-m", "benchmark.planner.record", str(file), *flags, *how)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    done = python("-m", "sglang_hma.planner", "fit", str(file))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("8 requests in") == 2


def test_bench_serving_shared_prefix(bench: Bench) -> None:
    args = ["--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "2"]
    args += ["--gsp-prompts-per-group", "4", "--gsp-system-prompt-len", "128"]
    args += ["--gsp-question-len", "16", "--gsp-output-len", "8"]
    result = bench(*args)
    assert result["completed"] == 8


FRONTEND = """
import sys
import sglang as sgl
from sglang import RuntimeEndpoint

sgl.set_default_backend(RuntimeEndpoint(sys.argv[1]))


@sgl.function
def program(s, q):
    s += "Q: " + q + "\\nA:" + sgl.gen("a", max_tokens=8, temperature=0)
    forks = s.fork(2)
    for i, f in enumerate(forks):
        f += f"\\n{i}:" + sgl.gen("b", max_tokens=4, temperature=0)
    s += "\\n" + forks[0]["b"] + forks[1]["b"]
    s += sgl.gen("c", max_tokens=6, regex="[0-9]{2}", temperature=0)


state = program.run("what is x?")
assert state["a"] and len(state["c"]) == 2 and state["c"].isdigit(), state.text()
batch = program.run_batch([{"q": "one"}, {"q": "two"}, {"q": "three"}], num_threads=2)
assert all(s["a"] for s in batch)
streamed = "".join(program.run("stream me", stream=True).text_iter())
assert streamed.startswith("Q: stream me")
print("frontend ok")
"""

SELECT = """
import sys
import sglang as sgl
from sglang import RuntimeEndpoint

sgl.set_default_backend(RuntimeEndpoint(sys.argv[1]))


@sgl.function
def choose(s):
    s += "Is it? " + sgl.select("d", choices=["yes", "no"])


state = choose.run()
assert state["d"] in ("yes", "no"), state.error()
print("select ok", state["d"])
"""


def test_frontend_programs(python: WarmPython, pair: Pair) -> None:
    done = python("-c", FRONTEND, pair.url)
    assert "frontend ok" in done.stdout, done.stdout + done.stderr


def test_select(python: WarmPython, pair: Pair, single: Server) -> None:
    """`select` sends a list of texts, and asks for the logprobs of each."""
    picked = []
    for url in (single.url, pair.url):
        done = python("-c", SELECT, url)
        assert "select ok" in done.stdout, done.stdout + done.stderr
        picked.append(done.stdout)
    assert picked[0] == picked[1]


def test_openai_client(pair: Pair) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{pair.url}/v1", api_key="none")
    chat = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert chat.usage is not None and chat.usage.completion_tokens <= 8
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in logprobs.content)

    text = client.completions.create(model="default", prompt="Hello", max_tokens=8, temperature=0)
    stream = client.completions.create(
        model="default", prompt="Hello", max_tokens=8, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert "".join(pieces) == text.choices[0].text
    scored = client.completions.create(
        model="default", prompt="Hello", max_tokens=4, temperature=0, logprobs=2
    )
    assert scored.choices[0].logprobs is not None
    assert len(scored.choices[0].logprobs.tokens or []) == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"input_ids": [5, 10**7]},
        {"input_ids": None, "text": ""},
        {"positional_embed_overrides": {"a": 1}},
        {"return_hidden_states": []},
        {"custom_labels": {"": ""}},
        {"lora_id": ["x"]},
        {"lora_id": "x"},
        {"disagg_prefill_dp_rank": 7},
        {"disagg_prefill_dp_rank": -1},
        {"sampling_params": {"repetition_penalty": 1e-320}},
        {"sampling_params": {"n": 1 << 20}},
    ],
)
def test_a_value_that_would_end_a_scheduler_is_refused(pair: Pair, fields: dict[str, Any]) -> None:
    before = output_ids(pair.url, [5, 6, 7], 4)
    room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": pair.prefill.bootstrap_port}
    body = payload([5, 6, 7], 4) | room | {"bootstrap_room": 7} | fields
    for server in (pair.prefill, pair.decode):
        reply = requests.post(f"{server.url}/generate", json=body)
        assert reply.status_code == 400, reply.text
    assert output_ids(pair.url, [5, 6, 7], 4) == before


def test_a_profile_is_made_or_refused_and_the_server_serves_on(pair: Pair, tmp_path: Path) -> None:
    """As bench_serving --profile asks for; the second wants a tool that is not there."""
    before = output_ids(pair.url, [5, 6, 7], 8)
    servers = {"prefill": pair.prefill, "decode": pair.decode}
    for name, server in servers.items():
        gpu_trace.start(server.url, tmp_path / name, steps=2)
    assert output_ids(pair.url, [5, 6, 7], 8) == before
    for name, server in servers.items():
        requests.post(f"{server.url}/stop_profile")
        gpu_trace.wait(tmp_path / name, 120)
        reply = requests.post(f"{server.url}/start_profile", json={"activities": ["RPD"]})
        assert reply.status_code == 500
    assert output_ids(pair.url, [5, 6, 7], 8) == before


def test_an_operator_s_command_without_its_flag_is_refused(pair: Pair) -> None:
    before = output_ids(pair.url, [5, 6, 7], 4)
    for path in NEEDS:
        for server in (pair.prefill, pair.decode):
            assert requests.post(f"{server.url}{path}", json={}).status_code == 400
    assert output_ids(pair.url, [5, 6, 7], 4) == before
