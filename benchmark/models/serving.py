"""One real server of a family, both roles, in float32 on a CPU: what it answers, or why not."""

import json
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from benchmark.serving.pd_servers import Server
from sglang_hma.launch.diagnosis import diagnose, one_line_error

START_S = 600  # only to end a hang
ANSWER_S = 300
CHUNK = 64
TOKENS = 24
FLAGS = (
    *("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "2048"),
    *("--chunked-prefill-size", str(CHUNK), "--skip-tokenizer-init"),
)
ENVIRONMENT = {"SGLANG_HMA_SHARE": "2"}

Format = Literal["native", "bfp8"]


class NotServed(Exception):
    """`refused`: by our launcher. The message is one line."""

    def __init__(self, line: str, *, refused: bool) -> None:
        super().__init__(line)
        self.refused = refused


@dataclass(frozen=True)
class Answer:
    """`prompt_logprobs` of the prompt's tokens from the second on, `logprobs` of `tokens`."""

    prompt: list[int]
    tokens: list[int]
    prompt_logprobs: list[float]
    logprobs: list[float]


def serve_both(
    model: Path, logs: Path, prompts: Sequence[list[int]]
) -> tuple[list[Answer] | NotServed, list[Answer]]:
    """By a native and a bfp8 server. Raises NotServed if the latter, or both, do not."""
    servers = {form: start(model, form, logs / f"{form}.log") for form in get_args(Format)}
    try:
        native: list[Answer] | NotServed
        try:
            native = answers(servers["native"], model, prompts)
        except NotServed as reason:
            if not reason.refused:
                raise
            native = reason
        return native, answers(servers["bfp8"], model, prompts)
    finally:
        for server in servers.values():
            server.stop()


def start(model: Path, form: Format, log: Path) -> Server:
    server = Server(form, log, [*FLAGS, "--hma-kv-format", form], ENVIRONMENT)
    return server.start(model, "null")


def answers(server: Server, model: Path, prompts: Sequence[list[int]]) -> list[Answer]:
    """Raises NotServed."""
    try:
        if not server.wait_ready(time.monotonic() + START_S):
            raise NotServed("did not start", refused=False)
        return [ask(server.url, prompt) for prompt in prompts]
    except (NotServed, OSError) as error:
        raise _why(error, server, model) from None


def _why(error: Exception, server: Server, model: Path) -> NotServed:
    """What the log says, before what a client saw."""
    lines = server.log.read_text(errors="replace").splitlines()
    refused = bool(one_line_error(lines))
    words = diagnose(lines, killed=False)
    said = " ".join(" ".join(words.words).split()) if words.explained else str(error)
    said = said.removeprefix("sglang_hma.launch_server: error: ").replace(str(model), "MODEL")
    return NotServed(f"{server.name}: {said[:300]}", refused=refused)


def ask(url: str, prompt: list[int]) -> Answer:
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_S) as reply:
        answer: dict[str, Any] = json.load(reply)
    meta = answer["meta_info"]
    return Answer(
        prompt=prompt,
        tokens=list(answer["output_ids"]),
        prompt_logprobs=[value for value, *_ in meta["input_token_logprobs"][1:]],
        logprobs=[value for value, *_ in meta["output_token_logprobs"]],
    )
