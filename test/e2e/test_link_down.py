"""The cable between prefill and decode is pulled for five seconds, under load, HMA_SOAK times."""

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmark.transfer.link import LinkError, link
from benchmark.transfer.pairs import running

from .client import WITH_MARGINS, Greedy, payload
from .harness import free_port, until
from .test_faults import REPEATS, REQUEST_TIMEOUT_S

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(REPEATS == 1, reason="takes minutes and root: make repeat-faults"),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

DOWN_S = 5


def test_link_down(model: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    jobs = [[rng.randrange(8, 4000) for _ in range(rng.choice([33, 200, 700]))] for _ in range(16)]
    flags = ["--dtype", "float32", "--chunked-prefill-size", "64", "--max-total-tokens", "16384"]
    try:
        with (
            link() as road,
            running("ours", model, road, tmp_path, free_port(), flags) as pair,
        ):

            def ask(prompt: list[int], **extra: Any) -> tuple[int, Any]:
                def post() -> requests.Response:
                    url = f"{pair.url}/generate"
                    return requests.post(
                        url, json=payload(prompt, 8, **extra), timeout=REQUEST_TIMEOUT_S
                    )

                reply = road.call(road.prefill, post)
                return reply.status_code, reply.json() if reply.ok else reply.text

            quiet = [Greedy.of(ask(prompt, **WITH_MARGINS)[1]) for prompt in jobs]
            for turn in range(REPEATS):
                answers: list[tuple[int, Any] | None] = [None] * len(jobs)

                def one(index: int, into: list[Any] = answers) -> None:
                    into[index] = ask(jobs[index])

                threads = [threading.Thread(target=one, args=(i,)) for i in range(len(jobs))]
                for thread in threads:
                    thread.start()
                time.sleep(rng.uniform(0.1, 0.8))
                road.set_up(False)
                time.sleep(DOWN_S)
                road.set_up(True)
                for thread in threads:
                    thread.join()
                for answer, expected in zip(answers, quiet, strict=True):
                    assert answer is not None, "no answer within the client's timeout"
                    status, body = answer
                    if status == 200 and body["meta_info"]["finish_reason"]["type"] != "abort":
                        assert body["output_ids"] == expected
                    else:
                        assert body
                refused = sum(answer is not None and answer[0] != 200 for answer in answers)
                until(lambda: ask(jobs[0])[0] == 200)
                print(f"round {turn}: {refused} refused")
                assert ask(jobs[0])[1]["output_ids"] == quiet[0]
    except LinkError as error:
        pytest.skip(str(error))
