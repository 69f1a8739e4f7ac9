"""What `advise` says of loads that are known, against closed forms."""

import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from sglang_hma.planner.__main__ import main
from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.live import sources
from sglang_hma.planner.live.advice import Advice, Model, Unknown, advise
from sglang_hma.planner.live.fetch import Unheard
from sglang_hma.planner.live.history import Server
from sglang_hma.planner.live.roles import see
from sglang_hma.planner.live.verdict import print_seen, verdict
from sglang_hma.planner.step_times import Affine

from .live_fleet import Exporter, Prometheus, answering, prometheus, serving

OBJECTIVES = Objectives(ttft_s=2.0, tpot_s=0.1)


@dataclass
class Load:
    """Of a mix, in a second of it or at any time."""

    busy: list[float]
    """Of each prefill server."""
    running: list[float]
    """KV memory of each decode server's running requests."""
    pending: list[float]
    requests_s: float = 2.0
    prompt: int = 1000
    made: int = 101
    ttft_s: float = 0.5
    tpot_s: float = 0.03
    growth_s: float = 0.0
    """Requests that come in a second and are not finished."""
    ranks: int = 1

    def __post_init__(self) -> None:
        self.prefill = [Exporter("prefill", ranks=self.ranks) for _ in self.busy]
        self.decode = [Exporter("decode", ranks=self.ranks) for _ in self.running]
        self.now = 0.0
        for server, running, pending in zip(self.decode, self.running, self.pending, strict=True):
            server.gauge("full_token_usage", running + pending)
            server.gauge("prealloc_full_token_usage", pending)
        self._under_way()

    def advance(self, seconds: float) -> None:
        """Requests spread over servers in turn."""
        self.now += seconds
        count = round(self.requests_s * seconds)
        for server, busy in zip(self.prefill, self.busy, strict=True):
            server.stage("run_batch", busy * seconds * 0.75)
            server.stage("process_batch_result", busy * seconds * 0.125)
            server.stage("process_batch_result", busy * seconds * 0.125, overlap="full")
            server.stage("idle", (1 - busy) * seconds)
        for index in range(count):
            for servers in (self.prefill, self.decode):
                server = servers[index % len(servers)]
                server.request(self.prompt, self.made, self.ttft_s, self.tpot_s)
            self.prefill[index % len(self.prefill)].tokens("prefill_compute", self.prompt)
            self.decode[index % len(self.decode)].tokens("decode", self.made)
        self._under_way()

    def _under_way(self) -> None:
        self.decode[0].gauge("num_decode_transfer_queue_reqs", round(self.growth_s * self.now))

    @property
    def exporters(self) -> list[Exporter]:
        return [*self.prefill, *self.decode]

    def scraped(self, seconds: float) -> list[Server]:
        with serving(*self.exporters) as urls:
            return sources.scrape(urls, seconds, clock=lambda: self.now, sleep=self.advance)

    def recorded(self, seconds: float, step: float, colon: str = ":") -> Prometheus:
        told = Prometheus(colon)
        names = [f"{each.role}-{index}:30001" for index, each in enumerate(self.exporters)]
        for _ in range(round(seconds / step)):
            told.scrape(1e9 + self.now, **dict(zip(names, self.exporters, strict=True)))
            self.advance(step)
        told.scrape(1e9 + self.now, **dict(zip(names, self.exporters, strict=True)))
        return told


def advised(load: Load, target: float, model: Model | None = None) -> Advice:
    found = advise(see(load.scraped(50)), OBJECTIVES, target, model)
    assert found is not None
    return found


def test_loads_are_sums_of_what_servers_do(seed: int) -> None:
    draw = Random(seed)
    for _ in range(5):
        busy = [draw.uniform(0.05, 1.0) for _ in range(draw.randint(1, 5))]
        running = [draw.uniform(0.05, 0.6) for _ in range(draw.randint(1, 4))]
        pending = [draw.uniform(0.0, 0.3) for _ in running]
        growth_s, target = draw.choice((0.0, 0.0, 1.5)), draw.uniform(0.5, 1.0)
        found = advised(
            Load(busy, running, pending, growth_s=growth_s, ranks=draw.randint(1, 2)), target
        )
        more = 1 + growth_s * 50 / 100
        held = running if found.prefill.short else [*running, *pending]
        for need, shares, servers in ((found.prefill, busy, busy), (found.decode, held, running)):
            expected = sum(shares) * more
            assert need.load.instances == pytest.approx(expected)
            assert need.there == len(servers)
            assert need.needed == max(1, math.ceil(expected / target - 1e-6))
        assert found.decode.load.bound == "memory"
        assert found.prefill.load.at_least == (sum(busy) / len(busy) >= 0.95)


@pytest.mark.parametrize("colon", [":", "_"])
def test_prometheus_tells_the_same_as_the_servers(
    colon: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = Random(seed)
    load = Load([draw.uniform(0.4, 0.9) for _ in range(3)], [0.3, 0.4], [0.1, 0.0])
    told = load.recorded(120, step=15, colon=colon)
    with prometheus(told) as url:
        found = advise(see(sources.ask(url, 2, 'namespace="x"')), OBJECTIVES, 0.8)
        main(f"advise --prometheus {url} --window 2 --target 0.8".split())
    assert found is not None
    assert found.prefill.load.instances == pytest.approx(sum(load.busy))
    assert found.decode.load.instances == pytest.approx(0.7 if found.prefill.short else 0.8)
    asked, again = told.queries
    assert asked == again.replace('"}', '",namespace="x"}')
    assert again.endswith("[120s]")
    assert f"load {sum(load.busy):.2f} instances" in capsys.readouterr().out


def test_tokens_a_second_at_the_objective(seed: int) -> None:
    """Steps that take a + b n: the largest batch in time is (limit / factor - a) / b."""
    draw = Random(seed)
    for _ in range(5):
        servers = draw.randint(1, 3)
        load = Load([0.5], [0.05] * servers, [0.0] * servers, requests_s=draw.randint(2, 20))
        times = Affine(
            step_s=draw.uniform(0.005, 0.02),
            request_s=draw.uniform(1e-5, 1e-3),
            seen_s=draw.uniform(1e-8, 1e-6),
        )
        found = advised(load, 0.8, Model(times, times))
        # All TPOT are 0.03 s, in the bucket from 0.025 on: nine tenths of it.
        measured = 0.025 + 0.9 * 0.005
        batch = load.requests_s * load.made * load.tpot_s
        slope = times.request_s + times.seen_s * (load.prompt + load.made / 2)
        factor = measured / (times.step_s + slope * max(1, round(batch / servers)))
        best = math.floor((OBJECTIVES.tpot_s / factor - times.step_s) / slope + 1e-9)
        rate = best / (factor * (times.step_s + slope * best))
        expected = load.requests_s * load.made / rate
        assert found.decode.load.instances == pytest.approx(max(expected, sum(load.running)))
        if expected > sum(load.running):
            assert found.decode.load.bound == "steps"
            assert found.decode.load.factor == pytest.approx(factor)


def test_an_objective_that_one_request_misses_is_impossible() -> None:
    load = Load([0.5], [0.1], [0.0], tpot_s=5.0)
    times = Affine(step_s=0.01, request_s=1e-9)
    seen = see(load.scraped(50))
    found = advise(seen, OBJECTIVES, 0.8, Model(times, times))
    assert found is not None
    assert found.decode.needed is None
    assert "no number of such instances keeps it" in verdict(found, seen, OBJECTIVES, {})[-1]


def test_a_missed_tpot_without_a_model_is_a_full_role() -> None:
    found = advised(Load([0.5], [0.1, 0.1], [0.0, 0.0], tpot_s=0.4), 0.8)
    need = found.decode
    assert (need.load.instances, need.load.bound, need.load.at_least) == (2.0, "steps", True)
    assert need.needed == 3


@pytest.mark.parametrize(
    ("busy", "pages", "pending", "instances", "lower"),
    [
        (0.2, 0, 0.0, 0.29, False),
        (0.2, 7, 0.0, 1.0, True),
        (0.2, 0, 0.7, 0.99, True),
        (0.9, 0, 0.7, 0.29, True),
        (0.9, 7, 0.7, 0.29, True),
    ],
)
def test_a_full_pool(
    busy: float, pages: int, pending: float, instances: float, lower: bool
) -> None:
    """Decode is short of memory, unless what fills it waits for a prefill that is short."""
    load = Load([busy], [0.29], [pending])
    load.decode[0].gauge("num_decode_prealloc_queue_reqs", pages)
    found = advised(load, 0.8)
    assert found.prefill.short == (busy > 0.8)
    assert found.decode.load.instances == pytest.approx(instances)
    assert found.decode.load.at_least == lower


def test_without_stage_times_the_model_says_how_long_passes_take() -> None:
    load = Load([0.5, 0.5], [0.1], [0.0])
    servers = load.scraped(50)
    for server in servers:
        server._series.pop("sglang:scheduler_stage_seconds_total")
    times = Affine(pass_s=0.01, token_s=1e-4, step_s=0.01, request_s=1e-4)
    with pytest.raises(Unknown, match="give --model"):
        advise(see(servers), OBJECTIVES, 0.8)
    found = advise(see(servers), OBJECTIVES, 0.8, Model(times, times))
    assert found is not None
    assert found.prefill.load.bound == "tokens"
    assert found.prefill.load.instances == pytest.approx(load.requests_s * (0.01 + 0.1))


def test_a_restart_between_two_looks(seed: int) -> None:
    """What was counted before is gone; nothing is negative, and it is said."""
    load = Load([0.6, 0.6], [0.3], [0.0])
    load.advance(Random(seed).uniform(100, 500))
    restarted = load.prefill[1]

    def sleep(seconds: float) -> None:
        load.advance(seconds / 2)
        restarted.restart()
        load.advance(seconds / 2)

    with serving(*load.exporters) as urls:
        seen = see(sources.scrape(urls, 60, clock=lambda: load.now, sleep=sleep))
    assert seen.prefill.busy == pytest.approx((0.6, 0.3))
    assert seen.restarted == (sources.metrics_url(urls[1]),)


def test_a_router_tells_what_it_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    load = Load([0.6], [0.3], [0.0])
    given = iter((100, 340))

    def answer(_: str) -> tuple[int, bytes]:
        text = 'smg_worker_health{worker="a"} 1\n'
        return 200, f'{text}smg_router_requests_total{{model="m"}} {next(given)}\n'.encode()

    with serving(*load.exporters) as urls, answering(answer) as router:
        seen = see(sources.scrape([*urls, router], 60, clock=lambda: load.now, sleep=load.advance))
    assert seen.routed_s == pytest.approx(4.0)
    print_seen(seen, OBJECTIVES)
    assert "requests/s at the router" in capsys.readouterr().out


def test_a_server_that_went_away_is_not_counted() -> None:
    load = Load([0.6, 0.6], [0.3], [0.0])
    told = Prometheus()
    for step in range(41):
        names = {f"s{index}": each for index, each in enumerate(load.exporters)}
        if step > 30:
            del names["s1"]
        told.scrape(load.now, **names)
        load.advance(15)
    with prometheus(told) as url:
        seen = see(sources.ask(url, 10))
    assert seen.gone == ("s1",)
    assert seen.prefill.servers == ("s0",)


def test_no_traffic_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    load = Load([0.0], [0.0], [0.0], requests_s=0.0)
    with serving(*load.exporters) as urls:
        main(["advise", "--metrics", *urls, "--interval", "0.01"])
    out = capsys.readouterr().out
    assert "too little to say anything: 0 requests finished" in out
    assert "short" not in out


def test_the_verdict_names_role_number_and_target(capsys: pytest.CaptureFixture[str]) -> None:
    load = Load([0.9, 0.8], [0.3], [0.2], growth_s=1.0)
    with prometheus(load.recorded(60, step=15)) as url:
        main(
            f"advise --prometheus {url} --window 1 --target 0.75 --model Qwen3-8B --gddr n300 "
            "--hbm h100-sxm".split()
        )
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("prefill: load 2.55 instances (busy with passes") for line in lines)
    (said,) = (line for line in lines if "is short" in line)
    assert said == (
        "prefill is short: 4 instances of 1 x n300 would serve this load at 0.75 utilization, "
        "2 are there"
    )


def test_times_are_those_of_streamed_requests() -> None:
    load = Load([0.1], [0.1], [0.0])

    def sleep(seconds: float) -> None:
        load.advance(seconds)
        for _ in range(500):
            load.decode[0].request(1, 1, 300.0, 7.0, streamed=False)

    with serving(*load.exporters) as urls:
        decode = see(sources.scrape(urls, 50, clock=lambda: load.now, sleep=sleep)).decode
    assert decode.requests == 600
    assert decode.ttft.count == decode.tpot.count == 100
    assert decode.tpot.mean == pytest.approx(load.tpot_s)
    assert decode.batch == pytest.approx(load.requests_s * load.made * load.tpot_s)


def test_first_tokens_that_wait_for_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    load = Load([0.1, 0.1], [0.1], [0.0], ttft_s=7.0)
    with prometheus(load.recorded(60, step=15)) as url:
        main(f"advise --prometheus {url} --window 1".split())
    out = capsys.readouterr().out
    assert "neither role is short; 1 of 2 prefill instances to spare" in out
    assert "but only 0% of requests have their first token within 2 s" in out


@pytest.mark.parametrize(
    ("roles", "models", "said"),
    [
        (["prefill"], "m", "no decode server among"),
        (["decode"], "m", "no prefill server among"),
        (["prefill", "decode", "unified"], "m", "serves as 'unified'"),
        (["prefill", "decode"], "ab", "several models, a, b"),
    ],
)
def test_servers_that_are_no_mix(roles: list[str], models: str, said: str) -> None:
    every = [Exporter(role, models[index % len(models)]) for index, role in enumerate(roles)]
    with serving(*every) as urls, pytest.raises(Unheard, match=said):
        see(sources.scrape(urls, 0.0))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--prometheus http://127.0.0.1:9 --target 0", "--target is 0; needs a share"),
        ("--prometheus http://127.0.0.1:9 --window -1", "--window is -1; needs a time above 0"),
        ("--metrics 127.0.0.1:9 --interval nan", "--interval is nan; needs a time above 0"),
        ("--metrics ftp://127.0.0.1:9", "needs http://HOST:PORT"),
        ("--metrics 127.0.0.1:9", "http://127.0.0.1:9/metrics: "),
        ("--metrics 127.0.0.1:9 --ttft 1", "--ttft and --tpot are one pair"),
        ("--metrics 127.0.0.1:9 --model Qwen9", "model 'Qwen9' is no config.json"),
    ],
)
def test_bad_input_is_one_line(flags: str, said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(f"advise {flags}".split())
    message = str(ended.value)
    assert message.startswith("sglang_hma.planner: error: ")
    assert said in message
    assert "\n" not in message


def test_sglang_has_what_is_asked_for() -> None:
    """By its source: its module makes its metrics where it is imported."""
    from importlib.util import find_spec

    spec = find_spec("sglang")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "srt" / "observability"
    metrics = (folder / "metrics_collector.py").read_text()
    for name in sources.NAMES - {sources.ROUTED}:
        assert f'name="{name.removesuffix("_bucket").removesuffix("_sum")}"' in metrics
    stages = (folder / "scheduler_stage_metrics.py").read_text()
    for stage in ("run_batch", "process_batch_result"):
        assert f'= "{stage}"\n' in stages
