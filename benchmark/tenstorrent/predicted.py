"""Seconds of recorded calls on a card. Nothing here was measured with this runtime.

An operation takes the longest of its DRAM traffic, its products and its traffic between chips, and
a fixed time a program. The host enqueues one call after another, each in a fixed time, and the card
works behind it; where the forward waits for the card or reads from it, the host stands still.
Copies to the host go beside, on a queue of their own, once what they copy has been computed. What
other threads do costs the forward nothing.

Rates are the vendor's, from the planner's catalogue, unless a share of them is given. So a time is
a floor: no program reaches the peaks, and two operations never share the card.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmark.tenstorrent.counts import UNSAID
from benchmark.tenstorrent.driven import Bucket, config_of, record
from benchmark.tenstorrent.recorder import Call
from sglang_hma.planner import catalogue

CARDS = {"n150": "n150", "n300": "n300", "p100": "p100a", "p150": "p150"}
# Passes of the matrix engine over its operands (tt-metal, tech_reports/matrix_engine).
PASSES = {"LoFi": 1, "HiFi2": 2, "HiFi3": 3, "HiFi4": 4}
# Which of them the data sheets' BFP8 rates are for. A core does 4,096 operations a cycle at LoFi
# (the same report): 72 and 128 cores of a Wormhole at 1 GHz make twice the 148 and 262 TFLOPS of
# docs.tenstorrent.com/aibs/wormhole, 120 of a Blackhole at 1.35 GHz make its 664.
QUOTED_PASSES = {"n150": 2, "n300": 2, "p100a": 1, "p150": 1}
# To another chip, on the card or over its ports, each way: 400GbE of a Wormhole and 800G of a
# Blackhole (docs.tenstorrent.com/aibs). A p100a has no ports.
LINK_BYTES_S = {"n150": 50e9, "n300": 50e9, "p150": 100e9}
# Time of a traced product less the card's own, and of small products that the host enqueues one by
# one (tt-metal, tech_reports/GEMM_FLOPS, tuned, its utilizations by host's and by device's clock):
# 1.4 to 1.9 us on p150 and 2.7 to 4.5 on n150; 35 to 75 us and 46 to 49.
PROGRAM_S = {"n150": 3e-6, "n300": 3e-6, "p100a": 1.6e-6, "p150": 1.6e-6}
HOST_CALL_S = 50e-6


@dataclass(frozen=True)
class Rates:
    """Of one chip. lofi: operations a second; dram, pcie, link: bytes a second; memory: bytes."""

    card: str
    chips: int
    lofi: float
    dram: float
    pcie: float
    memory: float
    link: float
    program_s: float
    host_call_s: float

    def flops_s(self, fidelity: str) -> float:
        return self.lofi / PASSES[fidelity or UNSAID]

    def shared(self, compute: float, memory: float) -> "Rates":
        """With these shares of the peaks reached."""
        return replace(self, lofi=self.lofi * compute, dram=self.dram * memory)


def linked(card: str) -> bool:
    """Whether it goes together with others of its kind."""
    return CARDS[card] in LINK_BYTES_S


def rates(card: str, host_call_s: float = HOST_CALL_S, cards: int = 1) -> Rates:
    """card: of CARDS; so many of them in a mesh. PCIe as the planner has it for a card's pages."""
    known = catalogue.load()
    name = CARDS[card]
    found = known.card(name)
    return Rates(
        card=f"{cards} x {card}" if cards > 1 else card,
        chips=found.chips * cards,
        lofi=found.tflops["bfp8"].value * 1e12 * QUOTED_PASSES[name] / found.chips,
        dram=found.bandwidth_gb_s.value * 1e9 / found.chips,
        pcie=known.hosts["workstation"].bus_gb_s.value * 1e9 / found.chips,
        memory=found.memory_gb.value * 1e9 / found.chips,
        link=LINK_BYTES_S.get(name, math.inf),
        program_s=PROGRAM_S[name],
        host_call_s=host_call_s,
    )


@dataclass(frozen=True)
class Prediction:
    """Seconds. card: its operations without gaps; host: its calls; pcie: all copies. products: of
    the matrix engines at their peak, the rest of the card's time is memory, links and programs."""

    total: float
    card: float
    host: float
    pcie: float
    products: float

    @property
    def utilization(self) -> float:
        """Share of the time that the products take at the engines' peak."""
        return self.products / self.total if self.total else 0.0

    @property
    def bound(self) -> str:
        parts = {"host": self.host, "card": self.card, "PCIe": self.pcie}
        return max(parts, key=lambda name: parts[name])


def operation_s(call: Call, on: Rates) -> float:
    products = call.flops / on.flops_s(call.fidelity)
    moved = max((call.reads + call.writes) / on.dram, call.link / on.link)
    return max(products, moved) + call.programs * on.program_s


def predict(calls: Sequence[Call], on: Rates, forward_thread: str = "MainThread") -> Prediction:
    host = card = copies = 0.0
    busy = called = pcie = products = 0.0
    for call in calls:
        if call.thread != forward_thread:
            continue
        host += call.host * on.host_call_s
        called += call.host * on.host_call_s
        bus = (call.up + call.down) / on.pcie
        pcie += bus
        if call.queue:
            if bus:
                copies = max(copies, card, host) + bus
        elif call.waits:
            host = max(host, card) + bus
        elif call.kind == "upload":
            host += bus
        elif call.programs:
            own = operation_s(call, on)
            card = max(card, host) + own
            busy += own
            products += call.flops / on.flops_s(call.fidelity)
    return Prediction(max(host, card, copies), busy, called, pcie, products)


def prefill_seconds(
    model: str, chunk: int, prefix: int = 0, batch: int = 1, card: str = "p150"
) -> float:
    """Of a pass over `batch` prompts of `chunk` new tokens each behind `prefix` cached ones: what a
    planner may take for a named point. A floor, at the vendor's rates."""
    on = rates(card)
    (recorded,) = record(config_of(model), [Bucket(chunk, batch, prefix)], on.chips)
    return predict(recorded.calls, on).total
