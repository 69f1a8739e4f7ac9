"""Clients that ask a fixed set of questions over and over, each with one request at a time."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from ..e2e.client import Greedy, greedy, payload
from .background import Background
from .outcome import Outcome, Reply, judge

LENGTHS, OUTPUTS = (20, 33, 64, 150, 400), (4, 12, 40)
WAIT_S = 300.0


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    tokens: int


def questions(seed: int, number: int) -> list[Question]:
    rng = random.Random(seed)
    return [
        Question([rng.randrange(8, 4000) for _ in range(rng.choice(LENGTHS))], rng.choice(OUTPUTS))
        for _ in range(number)
    ]


def quiet_answers(url: str, asked: list[Question]) -> list[Greedy]:
    """One by one, while nothing else happens."""
    return [greedy(url, each.prompt, each.tokens) for each in asked]


@dataclass
class Load(Background):
    """`clients` of them in a thread of their own; every second question is asked as a stream."""

    url: str
    asked: list[Question]
    quiet: list[Greedy]
    clients: int
    seed: int
    wait_s: float = WAIT_S
    limit: int | None = None  # of requests
    begun: int = 0
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()

    @property
    def lost(self) -> int:
        """Requests without an outcome."""
        return self.begun - len(self.outcomes)

    def counts(self) -> Counter[str]:
        return Counter(each.kind for each in list(self.outcomes))

    def first(self, test: Callable[[Outcome], bool]) -> Outcome | None:
        """Of those that pass, the one that ended first."""
        return min(filter(test, list(self.outcomes)), key=lambda each: each.ended_s, default=None)

    def _work(self) -> None:
        asyncio.run(self._all())

    async def _all(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self.wait_s)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            await asyncio.gather(*(self._client(session, i) for i in range(self.clients)))

    async def _client(self, session: aiohttp.ClientSession, index: int) -> None:
        rng = random.Random(f"{self.seed}/{index}")
        while not self.stop.is_set() and (self.limit is None or self.begun < self.limit):
            self.begun += 1
            which, streams = rng.randrange(len(self.asked)), rng.random() < 0.5
            began = time.monotonic()
            reply = await self._ask(session, self.asked[which], streams)
            kind, words = judge(reply, streams, self.quiet[which])
            self.outcomes.append(Outcome(kind, words, began, time.monotonic(), streams))
            if kind in ("refused", "cut"):
                await asyncio.sleep(0.2)  # as a client that tries again would

    async def _ask(self, session: aiohttp.ClientSession, asked: Question, streams: bool) -> Reply:
        reply = Reply()
        body = payload(asked.prompt, asked.tokens, stream=streams)
        try:
            async with session.post(f"{self.url}/generate", json=body) as response:
                reply.status = response.status
                async for chunk in response.content.iter_any():
                    reply.body += chunk
        except TimeoutError:
            reply.timed_out = True
        except (aiohttp.ClientError, OSError) as error:
            reply.error = repr(error)
        return reply
