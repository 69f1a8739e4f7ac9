"""The simulator against closed forms, recursions that need no events, and its own invariants."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.planner.fleets import PLAIN, boxes, pair
from sglang_hma.planner.measured import DecodeTimes, Measured, PrefillTimes
from sglang_hma.planner.replay import Pair
from sglang_hma.planner.simulation.batch import KVMemory, NeverFits
from sglang_hma.planner.simulation.fleet import Colocated, Disaggregated, Simulation
from sglang_hma.planner.simulation.job import Job
from sglang_hma.planner.step_times import Affine
from sglang_hma.planner.trace import Request, poisson

from .pair_by_steps import PairBySteps

Fleet = Colocated | Disaggregated


def alone(fleet: Fleet, prompt: int = 1000, made: int = 11) -> Job:
    (job,) = Simulation([Request(0.0, prompt, made)]).run(fleet)
    return job


@pytest.mark.parametrize("bytes_s", [1e2, 1e3, 1e4, 1e5])
def test_one_request_in_a_pipeline(bytes_s: float) -> None:
    """Layers are computed for c and sent for x each: L c + x, or c + L x, the longer one."""
    layers, compute, send = 4, 1.0 / 4, 1000 / bytes_s / 4
    job = alone(pair(prefill_links=(bytes_s,)))
    assert job.ttft_s == pytest.approx(max(layers * compute + send, compute + layers * send))
    assert job.tpot_s == pytest.approx(0.01)
    serial = alone(pair(prefill_links=(bytes_s,), layered=False))
    assert serial.ttft_s == pytest.approx(layers * (compute + send))


def test_one_request_in_chunks() -> None:
    """The last chunk's pages are the last to be sent."""
    job = alone(pair(chunk_tokens=400, prefill_links=(1e4,)))
    assert job.ttft_s == pytest.approx(1.0 + 200 / 1e4 / 4)


def test_one_request_in_one_box() -> None:
    job = alone(boxes())
    assert (job.ttft_s, job.tpot_s) == pytest.approx((1.0, 0.01))


def test_decode_steps_grow_with_the_context() -> None:
    """Ten steps after the first token; each sees the prompt and what was made before it."""
    job = alone(pair(decode_times=replace(PLAIN, seen_s=1e-5)))
    seconds = sum(0.01 + 1e-5 * (1000 + made) for made in range(1, 11))
    assert job.tpot_s * 10 == pytest.approx(seconds)


@given(st.integers(0, 2**32 - 1), st.floats(0.3, 1.2))
@settings(max_examples=20)
def test_prefill_queue_is_lindleys(seed: int, load: float) -> None:
    """One prompt a pass: each waits as long as the one before it waited and took, less the gap."""
    rng = np.random.default_rng(seed)
    requests = poisson([(int(n), 1) for n in rng.integers(1, 3000, 50)], load / 1.5, 300, seed)
    jobs = Simulation(requests).run(pair(max_prompts=1))
    wait, before = 0.0, requests[0]
    for request, job in zip(requests, jobs, strict=True):
        gap = request.arrival_s - before.arrival_s
        wait = max(0.0, wait + before.input_tokens * 1e-3 - gap) if request is not before else 0.0
        assert job.prefilled_at - job.arrived_at == pytest.approx(
            wait + request.input_tokens * 1e-3, abs=1e-6
        )
        before = request


def test_decode_lets_nobody_in_while_a_step_runs() -> None:
    """Steps of a second end at 1.1, 2.1, ...: the second request is let in at one of these, its
    prompt takes 0.3 s, and it joins at the next one."""
    requests = [Request(0.0, 100, 11), Request(2.5, 300, 2)]
    _, late = Simulation(requests).run(pair(decode_times=Affine(step_s=1.0)))
    assert late.prefilled_at == pytest.approx(3.1 + 0.3)
    assert late.first_token_at == pytest.approx(4.1)


def test_every_pass_and_step_written_out(seed: int) -> None:
    """Prompts in chunks and together, each batch's every step: the same times of every request."""
    rng = np.random.default_rng(seed)
    for _ in range(8):
        seconds = rng.uniform(0.1, 2, 7) * (0.05, 1e-3, 4e-7, 0.02, 4e-3, 2e-6, 0.03)
        times = Measured(
            "drawn", PrefillTimes(*seconds[:3]), DecodeTimes(*seconds[3:6]), float(seconds[6])
        )
        lengths = [tuple(map(int, each)) for each in rng.integers(1, (6000, 80), (9, 2))]
        requests = poisson(lengths, float(rng.uniform(0.1, 0.4)), 60, seed)
        recorded = PairBySteps(requests, times, 4096).run()
        jobs = Pair(4096).replay(times, requests)
        assert [job.ttft_s for job in jobs] == pytest.approx(recorded.ttft_s, abs=1e-6)
        assert [job.tpot_s for job in jobs] == pytest.approx(recorded.tpot_s, abs=1e-6)


def test_memory_limits_the_batch() -> None:
    """Room for four requests with what is kept for each: a fifth waits until one is done."""
    memory = KVMemory(4 * (1000 + 512), 1.0, 1.0)
    fleet = pair(prefill_times=replace(PLAIN, token_s=0.0), decode_memory=memory)
    jobs = Simulation([Request(0.0, 1000, 101) for _ in range(8)]).run(fleet)
    # Those of one moment join the first one's batch when its step is over.
    for index, job in enumerate(jobs):
        assert job.ttft_s == pytest.approx(index // 4 * 1.0, abs=0.0201)


def test_a_full_memory_retracts_the_youngest_and_loses_nothing() -> None:
    memory = KVMemory(2 * (100 + 512) + 250, 1.0, 1.0)
    fleet = pair(prefill_times=replace(PLAIN, token_s=0.0), decode_memory=memory)
    first, second = Simulation([Request(0.0, 100, 900), Request(1.0, 100, 900)]).run(fleet)
    assert (first.retractions, second.retractions) == (0, 1)
    assert first.tpot_s == pytest.approx(0.01)
    assert second.finished_at > first.finished_at


def test_what_never_fits_is_said() -> None:
    with pytest.raises(NeverFits, match="a request of 1000 and 11 tokens"):
        alone(pair(decode_memory=KVMemory(1000.0, 1.0, 1.0)))


def test_prefixes_are_computed_once() -> None:
    hashes = (1, 2, 3)
    requests = [Request(0.0, 1536, 1, hashes), Request(100.0, 1536, 1, (1, 2, 9))]
    first, second = Simulation(requests).run(pair(cache_tokens=1 << 20))
    assert first.ttft_s == pytest.approx(1.536, rel=1e-6)
    assert second.ttft_s == pytest.approx(0.512, rel=1e-6)
    assert second.known == 1024


lengths = st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 400)), min_size=1, max_size=8)


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    times = Affine(
        token_s=draw(st.floats(1e-5, 1e-2)),
        step_s=draw(st.floats(1e-3, 1e-1)),
        request_s=draw(st.floats(0, 1e-2)),
        seen_s=1e-6,
    )
    memory = KVMemory(draw(st.integers(6000, 60000)), 1.0, draw(st.sampled_from([1.0, 2.0])))
    chunk = draw(st.sampled_from([512, 8192]))
    count = draw(st.integers(1, 3))
    if draw(st.booleans()):
        return boxes(
            instances=count,
            times=times,
            memory=memory,
            chunk_tokens=chunk,
            mixed=draw(st.booleans()),
        )
    return pair(
        prefill_instances=draw(st.integers(1, 3)),
        decode_instances=count,
        prefill_times=times,
        decode_times=times,
        decode_memory=memory,
        chunk_tokens=chunk,
        layered=draw(st.booleans()),
        prefill_links=(draw(st.floats(1e4, 1e6)),),
        decode_links=(draw(st.floats(1e4, 1e6)),),
    )


@given(
    fleet=fleets(),
    lengths=lengths,
    rate=st.floats(0.01, 20),
    seed=st.integers(0, 2**32 - 1),
    policy=st.sampled_from(["random", "round_robin", "power_of_two"]),
)
def test_every_request_is_served_once_and_time_goes_on(
    fleet: Fleet, lengths: list[tuple[int, int]], rate: float, seed: int, policy: str
) -> None:
    requests = poisson(lengths, rate, 30, seed)
    simulation = Simulation(requests, policy, seed)  # type: ignore[arg-type]
    seen: list[float] = []
    at = simulation.clock.at

    def watched(when: float, call: object) -> None:
        assert when >= simulation.clock.now
        seen.append(when)
        at(when, call)  # type: ignore[arg-type]

    simulation.clock.at = watched  # type: ignore[method-assign]
    jobs = simulation.run(fleet)
    assert [job.request for job in jobs] == requests
    for job in jobs:
        assert job.generated == job.request.output_tokens
        assert job.known + job.computed == job.request.input_tokens
        assert job.arrived_at <= job.prefilled_at <= job.first_token_at <= job.finished_at
        assert not math.isnan(job.finished_at)
    again = Simulation(requests, policy, seed).run(fleet)  # type: ignore[arg-type]
    assert [job.finished_at for job in again] == [job.finished_at for job in jobs]


@given(st.integers(0, 2**32 - 1), st.floats(1e3, 1e5))
@settings(max_examples=30)
def test_a_faster_link_raises_no_ttft(seed: int, bytes_s: float) -> None:
    """With decode that never waits, so that nothing else depends on who comes when."""
    requests = poisson([(500, 2), (3000, 2), (50, 2)], 0.5, 60, seed)
    slow, fast = (
        Simulation(requests).run(
            pair(prefill_links=(speed,), decode_links=(speed,), decode_times=Affine(step_s=1e-9))
        )
        for speed in (bytes_s, 2 * bytes_s)
    )
    for before, after in zip(slow, fast, strict=True):
        assert after.ttft_s <= before.ttft_s + 1e-6


def test_more_cards_never_lower_what_is_kept() -> None:
    rng = np.random.default_rng()
    seed = int(rng.integers(2**32))
    print("seed", seed)
    requests = poisson([(1000, 50), (4000, 200)], 2.0, 500, seed)
    shares = []
    for count in (1, 2, 4, 8):
        jobs = Simulation(requests, seed=seed).run(
            pair(prefill_instances=2 * count, decode_instances=count, chunk_tokens=8192)
        )
        shares.append(sum(job.ttft_s <= 6.0 for job in jobs) / len(jobs))
    for fewer, more in pairwise(shares):
        assert more >= fewer - 0.02
    assert shares[-1] > shares[0]
