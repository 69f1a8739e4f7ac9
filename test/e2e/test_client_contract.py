"""What a client sends to a pair is answered as by one server, field by field."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests

from .client import FLIPPED_ROUNDING, Greedy, assert_drained, payload, words
from .draws import is_sure
from .harness import Pair, Server

pytestmark = pytest.mark.e2e

TOKENS = 8
# Differ from run to run, or say how it went.
OWN = ("id", "created", "rid", "e2e_latency", "cached_tokens", "prompt_tokens_details")
TIMES = ("_time", "_ts", "_s", "_wait", "latency", "throughput", "cached_tokens_details", "dp_rank")


@pytest.fixture
def asked(single: Server, model: Path, seed: int) -> "Asking":
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    return Asking(single.url, random.Random(seed), vocabulary)


class Asking:
    """Prompts whose answers no rounding changes."""

    def __init__(self, url: str, rng: random.Random, vocabulary: int) -> None:
        self._url, self.rng, self._vocabulary = url, rng, vocabulary

    def prompt(self, **sampling: Any) -> list[int]:
        """For requests with these sampling parameters beside a payload's."""
        while True:
            drawn = words(self.rng, self.rng.randrange(5, 80))
            body = payload(drawn, TOKENS, return_logprob=True, top_logprobs_num=self._vocabulary)
            body["sampling_params"] |= sampling
            reply = post(self._url, "/generate", body).json()
            if "sampling_seed" in sampling:
                if is_sure(reply, len(drawn), sampling, self._vocabulary):
                    return drawn
            elif Greedy.of(reply).sure == len(reply["output_ids"]):
                return drawn


def post(url: str, path: str, body: Any) -> requests.Response:
    return requests.post(url + path, json=body)


def same(found: Any, expected: Any, where: str = "") -> None:
    """Numbers as close as a rounding that turned; what differs from run to run is left out."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), where
        names = {name for name in expected if not _own(name)}
        assert {name for name in found if not _own(name)} == names, where
        for name in names:
            same(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list | tuple):
        assert isinstance(found, list | tuple), (where, found)
        assert len(found) == len(expected), (where, found, expected)
        for index, (one, another) in enumerate(zip(found, expected, strict=True)):
            same(one, another, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=FLIPPED_ROUNDING), (where, found, expected)
    else:
        assert found == expected, (where, found, expected)


def _own(name: str) -> bool:
    return name in OWN or any(name.endswith(end) for end in TIMES)


def compare(pair: Pair, single: Server, path: str, body: Any) -> Any:
    """The pair's answer, which is the single server's."""
    found, expected = post(pair.url, path, body), post(single.url, path, body)
    assert found.status_code == expected.status_code, (found.text, expected.text)
    if found.status_code >= 500:  # in the router's words
        return found.text
    assert found.headers["content-type"] == expected.headers["content-type"]
    same(found.json(), expected.json())
    return found.json()


@pytest.mark.parametrize("n", [2, 4])
def test_samples(pair: Pair, single: Server, asked: Asking, n: int) -> None:
    prompt = asked.prompt()
    body = payload(prompt, TOKENS)
    body["sampling_params"]["n"] = n
    answers = compare(pair, single, "/generate", body)
    assert len(answers) == n
    given = {"model": "m", "max_tokens": TOKENS, "temperature": 0, "n": n}
    batch = [asked.prompt(), asked.prompt()]
    found = compare(pair, single, "/v1/completions", given | {"prompt": batch})
    assert [choice["index"] for choice in found["choices"]] == list(range(2 * n))
    chat = {"messages": [{"role": "user", "content": "hello"}], "logprobs": True}
    assert len(compare(pair, single, "/v1/chat/completions", given | chat)["choices"]) == n
    assert_drained(pair.prefill, pair.decode)


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": {"17": 50.0}},
        {"min_new_tokens": 4, "ignore_eos": False},
        {"stop_token_ids": [17], "logit_bias": {"17": 50.0}, "ignore_eos": False},
        {"min_new_tokens": 3, "stop_token_ids": [17], "logit_bias": {"17": 50.0}},
        {"stop_regex": "[a-z]{2}", "ignore_eos": False},
        {"regex": "[0-9]{8}"},
        {"json_schema": '{"type": "object"}'},
        {"frequency_penalty": 1.5},
        {"presence_penalty": 1.5},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 1.5, "frequency_penalty": 1.5, "presence_penalty": -0.5},
        {"skip_special_tokens": False},
        {"no_stop_trim": True, "stop": ["a", "e"], "ignore_eos": False},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_sampling_parameters(
    pair: Pair, single: Server, asked: Asking, changes: dict[str, Any]
) -> None:
    """Also of the first token, which prefill makes."""
    body = payload(asked.prompt(**changes), TOKENS)
    body["sampling_params"] |= changes
    compare(pair, single, "/generate", body)
    assert_drained(pair.prefill, pair.decode)


def test_seeds(pair: Pair, single: Server, asked: Asking) -> None:
    """The same answer each time; another one to the same question with another seed."""
    said = []
    for seed in (1, 2):
        sampling = {"temperature": 1.0, "sampling_seed": seed}
        body = payload(asked.prompt(**sampling), TOKENS)
        body["sampling_params"] |= sampling
        answers = [
            post(url, "/generate", body).json()["output_ids"]
            for url in (pair.url, single.url, pair.url)
        ]
        assert answers[0] == answers[1] == answers[2]
        body["sampling_params"]["sampling_seed"] += 2
        said.append(answers[0] == post(pair.url, "/generate", body).json()["output_ids"])
    assert not all(said)


@pytest.mark.parametrize("start", [0, 3, -1])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_prompt(
    pair: Pair, single: Server, asked: Asking, start: int, stream: bool
) -> None:
    body = payload(
        asked.prompt(),
        TOKENS,
        return_logprob=True,
        logprob_start_len=start,
        top_logprobs_num=3,
        token_ids_logprob=[5, 6],
        return_text_in_logprobs=True,
    )
    if not stream:
        compare(pair, single, "/generate", body)
        return
    lines = []
    for url in (pair.url, single.url):
        text = post(url, "/generate", body | {"stream": True}).text
        data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data")]
        assert data.pop() == "[DONE]"
        lines.append(json.loads(data[-1])["meta_info"])
    for name in ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"):
        same(lines[0].get(name), lines[1].get(name), name)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hello", "echo": True, "logprobs": 2}),
        ("/v1/completions", {"prompt": [5, 6, 7]}),
        ("/v1/completions", {"prompt": [[5, 6], [7]], "logprobs": 1}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/generate", {"text": ["a", "b"], "sampling_params": {"temperature": 0}}),
        ("/generate", {"input_ids": [[5, 6], [7, 8, 9]], "sampling_params": {"temperature": 0}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_p": 7}),
        ("/generate", {}),
        ("/generate", {"text": "a", "sampling_params": {"temperature": -1}}),
        ("/generate", {"text": "a", "lora_path": "none"}),
        ("/generate", {"text": "a", "custom_logit_processor": "x"}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/tokenize", {"prompt": "hello world"}),
        ("/v1/tokenize", {"prompt": "hello world"}),
        ("/v1/responses", {"input": "hello"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hello"}]}),
    ],
)
def test_as_one_server(pair: Pair, single: Server, path: str, body: dict[str, Any]) -> None:
    if path.startswith("/v1/"):
        body = {"model": "m", "temperature": 0, "max_tokens": 4} | body
    compare(pair, single, path, body)


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/models", "/get_model_info", "/model_info", "/get_server_info", "/server_info"),
        *("/get_load", "/v1/loads", "/metrics"),
    ],
)
def test_questions(pair: Pair, single: Server, path: str) -> None:
    found, expected = (requests.get(f"{url}{path}") for url in (pair.url, single.url))
    assert found.status_code == expected.status_code, found.text
    kinds = [each.headers["content-type"].partition(";")[0] for each in (found, expected)]
    assert kinds[0] == kinds[1]
    if kinds[0] != "application/json":
        names = [
            {line.split()[2] for line in each.text.splitlines() if line.startswith("# TYPE sglang")}
            for each in (found, expected)
        ]
        assert names[0] >= names[1] and names[1]
    elif isinstance(expected.json(), list):
        assert [set(each) for each in found.json()] == [set(each) for each in expected.json()]
    else:
        assert set(found.json()) == set(expected.json())


def test_mixed_requests_at_once(pair: Pair, single: Server, asked: Asking) -> None:
    """With samples, biases, grammars, logprobs and seeds."""
    rng = asked.rng
    extras: list[dict[str, Any]] = [
        {},
        {"n": 2},
        {"logit_bias": {"17": 5.0}},
        {"regex": "[0-9]{4}", "ignore_eos": False},
        {"temperature": 1.0, "sampling_seed": 7},
        {"temperature": 1.0, "sampling_seed": 8, "top_k": 900, "min_p": 0.6},
        {"frequency_penalty": 1.0},
    ]
    prompts = [[asked.prompt(**_of_one(extra)) for _ in range(4)] for extra in extras]
    bodies = []
    for _ in range(200):
        kind = rng.randrange(len(extras))
        body = payload(rng.choice(prompts[kind]), TOKENS)
        body["sampling_params"] |= extras[kind]
        if rng.random() < 0.3:
            body |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
        bodies.append(body)

    async def ask(url: str, at_once: int) -> list[Any]:
        timeout, gate = aiohttp.ClientTimeout(total=None), asyncio.Semaphore(at_once)
        async with aiohttp.ClientSession(timeout=timeout) as session:

            async def one(body: Any) -> Any:
                async with gate, session.post(f"{url}/generate", json=body) as reply:
                    return reply.status, await reply.json()

            return await asyncio.gather(*map(one, bodies))

    found, expected = asyncio.run(ask(pair.url, 200)), asyncio.run(ask(single.url, 4))
    for body, answer, wanted in zip(bodies, found, expected, strict=True):
        assert answer[0] == wanted[0] == 200, answer
        same(_said(answer[1]), _said(wanted[1]), str(body["sampling_params"]))
    assert_drained(pair.prefill, pair.decode, single)


def _of_one(extra: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in extra.items() if name != "n"}


def _said(answer: Any) -> Any:
    each = answer if isinstance(answer, list) else [answer]
    return [(one["output_ids"], one["meta_info"].get("input_token_logprobs")) for one in each]


def test_select(pair: Pair, single: Server) -> None:
    import sglang

    @sglang.function
    def chosen(s: Any) -> None:
        s += "The answer is "
        s += sglang.select("answer", choices=["yes", "no", "perhaps not"])

    picked = []
    for url in (pair.url, single.url):
        backend = sglang.RuntimeEndpoint(url)
        picked.append(chosen.run(backend=backend)["answer"])
    assert picked[0] == picked[1]
