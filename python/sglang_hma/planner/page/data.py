"""What the page shows, as data. Figures and text are made of nothing else."""

import msgspec

from sglang_hma.planner.catalogue import Kind


class NamedFigure(msgspec.Struct, frozen=True):
    """A figure that an answer rests on. value: None where the source is a table of step times."""

    name: str
    value: float | None
    unit: str
    kind: Kind
    source: str
    low: float | None = None
    high: float | None = None


class Price(msgspec.Struct, frozen=True):
    """USD of a mix, by part. gddr_cards: how many of these cards there are."""

    hbm_usd: float
    gddr_usd: float
    gddr_cards: int
    hosts_usd: float
    nics_usd: float

    @property
    def usd(self) -> float:
        return self.hbm_usd + self.gddr_usd + self.hosts_usd + self.nics_usd


class Row(msgspec.Struct, frozen=True):
    """The best mix of a system. rate: requests/s in time; half_width: of its 95% interval.

    mix, price: None where no mix keeps the objectives; `alone` is then the share of requests that
    the best of them keeps when each is alone. beside_*: over homogeneous PD in BF16.
    """

    system: str
    title: str
    alone: float
    mix: str | None = None
    price: Price | None = None
    rate: float = 0.0
    half_width: float = 0.0
    per_thousand_usd: float = 0.0
    beside_rate: float | None = None
    beside_per_usd: float | None = None
    figures: list[NamedFigure] = []

    @property
    def assumed(self) -> int:
        return sum(figure.kind == "assumed" for figure in self.figures)

    @property
    def per_thousand_usd_half_width(self) -> float:
        return self.half_width / self.rate * self.per_thousand_usd


class Tried(msgspec.Struct, frozen=True):
    """A mix that was simulated. half_width: of the 95% interval of rate, requests/s."""

    system: str
    mix: str
    price_usd: float
    cards_usd: float
    watts: float
    rate: float
    half_width: float


class Curve(msgspec.Struct, frozen=True):
    """Share of requests in time by rate, requests/s: mean, least and most of the seeds."""

    system: str
    rates: list[float]
    shares: list[float]
    least: list[float]
    most: list[float]


class Distribution(msgspec.Struct, frozen=True):
    """Seconds that `shares` of the requests of all seeds do not exceed, each one of a request.

    tpot_s: of requests with more than one token; empty if there are none.
    """

    system: str
    shares: list[float]
    ttft_s: list[float]
    tpot_s: list[float]


class Distributions(msgspec.Struct, frozen=True):
    """At one rate, requests/s: `of_baseline` of the goodput of `baseline`."""

    rate: float
    of_baseline: float
    baseline: str
    systems: list[Distribution]


class Span(msgspec.Struct, frozen=True):
    """Times of a request in seconds, as Job has them, from the first arrival that is shown."""

    input_tokens: int
    output_tokens: int
    known_tokens: int
    retractions: int
    arrived: float
    promised: float
    prefill: float
    prefilled: float
    sending: float
    landed: float
    first_token: float
    finished: float


class Timeline(msgspec.Struct, frozen=True):
    """Of consecutive requests. rate: requests/s; of_goodput: as a share of the mix's goodput."""

    system: str
    mix: str
    rate: float
    of_goodput: float
    spans: list[Span]


class Choice(msgspec.Struct, frozen=True):
    """A position of a slider: an entry of the catalogue."""

    name: str
    label: str
    value: float
    kind: Kind
    source: str


class Line(msgspec.Struct, frozen=True):
    """Goodput per dollar of ours over a baseline's, by price ratio.

    basis: "whole" with hosts and NICs, or "cards" alone. crossing: the ratio at which it is 1;
    not above 0 where it is below 1 at any price.
    """

    baseline: str
    basis: str
    over: list[float]
    crossing: float


class State(msgspec.Struct, frozen=True):
    """At one efficiency and one link. By price ratio: the best mix of ours, its price in USD and
    its goodput in requests/s. Empty where no mix of ours keeps the objectives."""

    mixes: list[str] = []
    usd: list[float] = []
    rates: list[float] = []
    lines: list[Line] = []

    def line(self, baseline: str, basis: str) -> Line | None:
        found = [each for each in self.lines if (each.baseline, each.basis) == (baseline, basis)]
        return found[0] if found else None


class BreakEven(msgspec.Struct, frozen=True):
    """ratios: price of a GDDR card over that of an HBM card, which costs `hbm_usd` throughout.

    states: by efficiency, then by link. *_at: the index of what the comparison was made with.
    """

    hbm_usd: float
    ratios: list[float]
    efficiencies: list[Choice]
    links: list[Choice]
    states: list[list[State]]
    ratio_at: int
    efficiency_at: int
    link_at: int

    @property
    def lines(self) -> list[Line]:
        """Of all states."""
        return [line for row in self.states for state in row for line in state.lines]

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """Baseline and basis of the lines that some state has."""
        return list(dict.fromkeys((line.baseline, line.basis) for line in self.lines))


class Setting(msgspec.Struct, frozen=True):
    """What was asked. ttft_s, tpot_s: the objectives, in seconds; share: that must keep both."""

    version: str
    model: str
    trace: str
    hardware: str
    hbm: str
    gddr: str
    by: str
    budget: str
    ttft_s: float
    tpot_s: float
    share: float
    seeds: int
    requests: int
    tolerance: float
    policy: str
    chunk_tokens: int


class Page(msgspec.Struct, frozen=True):
    """None: what cannot be shown, because no system that it is about was compared."""

    setting: Setting
    rows: list[Row]
    tried: list[Tried]
    curves: list[Curve]
    distributions: Distributions | None
    break_even: BreakEven | None
    timeline: Timeline | None
