"""A prefill server that is killed in the middle of its writes, with a new one on its ports."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from .client import answered
from .conftest import Faults
from .harness import Pair, until


def replies_of_a_killed_prefill(
    pair: Pair, faults: Faults, after_writes: int, bodies: Sequence[dict[str, Any]]
) -> list[requests.Response]:
    """To `bodies`, sent to /generate at once; prefill is killed when one of them has made so many
    writes. The first of them is answered by the new process before this returns."""
    faults.set(hold_after=after_writes)
    with ThreadPoolExecutor(len(bodies)) as pool:
        asking = [pool.submit(requests.post, f"{pair.url}/generate", json=body) for body in bodies]
        until(faults.held.exists, pair.prefill, pair.decode)
        pair.prefill.kill()
        faults.set()
        pair.prefill.start()
        replies = [each.result() for each in asking]
    pair.prefill.wait_healthy()
    prompt = bodies[0]["input_ids"]
    until(lambda: answered(pair, prompt), pair.prefill, pair.decode)
    return replies
