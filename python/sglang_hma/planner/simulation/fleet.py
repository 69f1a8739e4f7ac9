"""A fleet of instances behind a router, and what becomes of a trace's requests in it."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from sglang_hma.planner.simulation.batch import KVMemory
from sglang_hma.planner.simulation.clock import Clock
from sglang_hma.planner.simulation.colocated_server import ColocatedServer
from sglang_hma.planner.simulation.decode_server import DecodeServer
from sglang_hma.planner.simulation.job import Job
from sglang_hma.planner.simulation.network import Link, Network
from sglang_hma.planner.simulation.prefill_server import PrefillServer, Produced
from sglang_hma.planner.simulation.prefix_cache import PrefixCache
from sglang_hma.planner.step_times import StepTimes
from sglang_hma.planner.trace import Request

Policy = Literal["random", "round_robin", "power_of_two"]


@dataclass(frozen=True)
class Colocated:
    """`instances` of the same cards, each with the whole model."""

    instances: int
    times: StepTimes
    memory: KVMemory
    cache_tokens: int
    chunk_tokens: int = 8192
    mixed: bool = False


@dataclass(frozen=True)
class Disaggregated:
    """Prefill instances that send pages to decode instances.

    prefill_links, decode_links: bytes a second of what lies one behind the other on the way out of
    a prefill instance (a card's own bus, a NIC) and into a decode instance. wire_bytes: of a
    token on the way. layered: pages of a layer leave when it is computed, not after the last one.
    overhead_s: of a request besides (HTTP, router, handshake); decode knows that much later of its
    last page.
    """

    prefill_instances: int
    decode_instances: int
    prefill_times: StepTimes
    decode_times: StepTimes
    decode_memory: KVMemory
    cache_tokens: int
    layers: int
    wire_bytes: float
    prefill_links: tuple[float, ...]
    decode_links: tuple[float, ...]
    layered: bool = True
    chunk_tokens: int = 8192
    max_prompts: int = 1 << 30
    overhead_s: float = 0.0


@dataclass
class Simulation:
    """Of one trace in one fleet. The same seed gives the same result."""

    requests: Sequence[Request]
    policy: Policy = "power_of_two"
    seed: int = 0
    clock: Clock = field(default_factory=Clock)
    jobs: list[Job] = field(default_factory=list)
    _turns: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def run(
        self,
        fleet: Colocated | Disaggregated,
        decided: Callable[["Simulation"], bool] = lambda _: False,
    ) -> list[Job]:
        """Every request, finished, in order of arrival; fewer, or not all finished, if all that
        is asked is `decided` before.

        Raises NeverFits.
        """
        _Pair(self, fleet) if isinstance(fleet, Disaggregated) else _Boxes(self, fleet)
        self.clock.run(lambda: decided(self))
        return self.jobs

    def choose(self, kind: str, count: int, load: Callable[[int], float]) -> int:
        """Of `count` servers of a kind, that of the next request."""
        if count == 1:
            return 0
        if self.policy == "round_robin":
            turn = self._turns[kind] = self._turns.get(kind, -1) + 1
            return turn % count
        if self.policy == "random":
            return self._random.randrange(count)
        return min(self._random.sample(range(count), 2), key=load)


class _Boxes:
    def __init__(self, simulation: Simulation, fleet: Colocated) -> None:
        self._simulation = simulation
        clock = simulation.clock
        self._servers = [
            ColocatedServer(
                clock,
                fleet.times,
                fleet.memory,
                fleet.chunk_tokens,
                PrefixCache(fleet.cache_tokens),
                fleet.mixed,
            )
            for _ in range(fleet.instances)
        ]
        _arrive(simulation, self._submit)

    def _submit(self, job: Job) -> None:
        servers = self._servers
        chosen = self._simulation.choose("server", len(servers), lambda i: servers[i].load)
        servers[chosen].submit(job)


class _Pair:
    def __init__(self, simulation: Simulation, fleet: Disaggregated) -> None:
        self._simulation, self._fleet = simulation, fleet
        clock = self._clock = simulation.clock
        self._network = Network(clock)
        self._out = [tuple(map(Link, fleet.prefill_links)) for _ in range(fleet.prefill_instances)]
        self._into = [tuple(map(Link, fleet.decode_links)) for _ in range(fleet.decode_instances)]
        self._ways: dict[Job, tuple[int, int]] = {}
        self._flows: dict[Job, int] = {}
        self._whole: set[Job] = set()
        self._promised = [0] * fleet.prefill_instances
        self._prefill = [
            PrefillServer(
                clock,
                fleet.prefill_times,
                fleet.chunk_tokens,
                PrefixCache(fleet.cache_tokens),
                self._send,
                fleet.max_prompts,
            )
            for _ in range(fleet.prefill_instances)
        ]
        self._decode = [
            DecodeServer(
                clock,
                fleet.decode_times,
                fleet.decode_memory,
                self._admitted,
            )
            for _ in range(fleet.decode_instances)
        ]
        _arrive(simulation, self._submit)

    def _submit(self, job: Job) -> None:
        """The router picks both; decode promises pages first."""
        choose, servers = self._simulation.choose, self._decode
        prefill = choose("prefill", len(self._prefill), self._promised.__getitem__)
        decode = choose("decode", len(servers), lambda i: servers[i].load)
        self._ways[job] = (prefill, decode)
        self._promised[prefill] += job.request.input_tokens
        self._decode[decode].submit(job)

    def _admitted(self, job: Job) -> None:
        job.promised_at = self._clock.now
        self._prefill[self._ways[job][0]].submit(job)

    def _send(self, job: Job, produced: Produced) -> None:
        """Called when a pass begins."""
        self._flows[job] = self._flows.get(job, 0) + 1
        if produced.last:
            self._whole.add(job)
        layer_s = (produced.end - produced.begin) / self._fleet.layers
        begin = produced.begin + layer_s if self._fleet.layered else produced.end
        self._clock.at(begin, partial(self._flow, job, produced))

    def _flow(self, job: Job, produced: Produced) -> None:
        if math.isnan(job.sending_at):
            job.sending_at = self._clock.now
        prefill, decode = self._ways[job]
        size = produced.tokens * self._fleet.wire_bytes
        self._network.send(
            self._out[prefill] + self._into[decode],
            size,
            partial(self._landed, job),
            ready_at=produced.end,
            tail=size / self._fleet.layers,
        )

    def _landed(self, job: Job) -> None:
        self._flows[job] -= 1
        if self._flows[job] or job not in self._whole:
            return
        del self._flows[job]
        self._whole.remove(job)
        job.landed_at = self._clock.now
        prefill, decode = self._ways.pop(job)
        self._promised[prefill] -= job.request.input_tokens
        known_at = self._clock.now + self._fleet.overhead_s
        self._clock.at(known_at, partial(self._decode[decode].arrived, job))


def _arrive(simulation: Simulation, submit: Callable[[Job], None]) -> None:
    """Let the trace's requests come, one after the other."""
    coming = iter(simulation.requests)

    def wait() -> None:
        request = next(coming, None)
        if request is not None:
            job = Job(request, request.arrival_s)
            simulation.jobs.append(job)
            simulation.clock.at(request.arrival_s, partial(come, job))

    def come(job: Job) -> None:
        submit(job)
        wait()

    wait()
