"""The systems that are compared, built from a catalogue, and what they cost."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from sglang_hma.planner import roofline, silicon
from sglang_hma.planner.catalogue import Catalogue, CatalogueError, Figure
from sglang_hma.planner.measured import Measured
from sglang_hma.planner.model_shape import KVFormat, ModelShape
from sglang_hma.planner.roofline import Roofline
from sglang_hma.planner.simulation.batch import KVMemory
from sglang_hma.planner.simulation.fleet import Colocated, Disaggregated
from sglang_hma.planner.step_times import Dequantizing, StepTimes

System = Literal[
    "colocated", "colocated-mixed", "pd-bf16", "pd-fp8", "hetero-eager", "hetero-serial", "ours"
]
SYSTEMS: tuple[System, ...] = get_args(System)
COLOCATED: tuple[System, ...] = ("colocated", "colocated-mixed")
TITLES = {
    "colocated": "co-located, chunked prefill, BF16",
    "colocated-mixed": "co-located, chunks mixed with decoding, BF16",
    "pd-bf16": "homogeneous PD, BF16",
    "pd-fp8": "homogeneous PD, FP8 KV",
    "hetero-eager": "GDDR prefill, KV dequantized before it is sent",
    "hetero-serial": "GDDR prefill, BFP8 pages, sent when a pass is over",
    "ours": "GDDR prefill, BFP8 pages, sent layer by layer",
}
HOSTS = {"nvidia": "hgx", "tenstorrent": "workstation"}


@dataclass(frozen=True)
class Site:
    """What can be bought, and how it is put together.

    hbm_cards, gddr_cards: of one instance. efficiency: of the GDDR cards, by name. measured: step
    times of an instance of each, prefill and decode over BFP8 pages, instead of a model's.
    """

    hbm: str = "a100-sxm-80"
    hbm_cards: int = 1
    gddr: str = "p150"
    gddr_cards: int = 1
    efficiency: str = "tenstorrent-one-chip"
    link: str = "100g"
    chunk_tokens: int = 8192
    measured: Measured | None = None

    def describe(self) -> str:
        return (
            f"{self.hbm_cards} x {self.hbm} an instance, {self.gddr_cards} x {self.gddr} an "
            f"instance at {self.efficiency}, {self.link}"
            f"{f'; {self.measured.source}' if self.measured else ''}"
        )


@dataclass(frozen=True)
class Offer:
    """A fleet, what it costs, and the figures that its answers rest on."""

    system: System
    prefill: int
    """Instances; 0 where the others do both."""
    decode: int
    fleet: Colocated | Disaggregated
    price_usd: float
    cards_usd: float
    """Of the price, the cards alone."""
    watts: float
    used: tuple[Figure, ...]

    @property
    def mix(self) -> str:
        return f"{self.prefill}P {self.decode}D" if self.prefill else f"{self.decode} x both"


def offer(
    catalogue: Catalogue,
    shape: ModelShape,
    site: Site,
    system: System,
    prefill: int,
    decode: int,
) -> Offer:
    """`prefill` instances and `decode` ones; co-located instances are counted as decode.

    Raises CatalogueError, DoesNotFit.
    """
    if site.link not in catalogue.links:
        known = ", ".join(catalogue.links)
        raise CatalogueError(f"link {site.link!r} is not in the catalogue; it has {known}")
    kv: KVFormat = "bf16"
    if system == "pd-fp8":
        kv = "fp8"
    elif system in ("hetero-serial", "ours"):
        kv = "bfp8"
    hbm = roofline.nvidia(catalogue, site.hbm, shape, site.hbm_cards, kv=kv)
    times = silicon.times_of(site.hbm, hbm)
    if system in COLOCATED:
        fleet: Colocated | Disaggregated = Colocated(
            decode,
            times,
            memory_of(hbm),
            cache_tokens=hbm.kv_tokens,
            chunk_tokens=site.chunk_tokens,
            mixed=system == "colocated-mixed",
        )
        return _priced(catalogue, site, system, 0, decode, fleet, times.used)
    if system in ("pd-bf16", "pd-fp8"):
        prefiller = roofline.nvidia(catalogue, site.hbm, shape, site.hbm_cards)
        prefill_times: StepTimes = silicon.times_of(site.hbm, prefiller)
        bus: tuple[Figure, ...] = ()
        wire = shape.kv_bytes(1, kv)
    else:
        prefiller = roofline.tenstorrent(
            catalogue, site.gddr, shape, site.gddr_cards, efficiency=site.efficiency
        )
        prefill_times = prefiller
        if system == "hetero-eager":
            moved = shape.kv_bytes(1, "bfp8") + shape.kv_bytes(1, "bf16")
            prefill_times = Dequantizing(prefiller, moved / prefiller.bytes_s, prefiller.used)
        bus = (catalogue.hosts[HOSTS["tenstorrent"]].bus_gb_s,)
        wire = shape.kv_bytes(1, "bf16" if system == "hetero-eager" else "bfp8")
    decode_times: StepTimes = times
    overhead = 0.0
    if site.measured and system in ("hetero-serial", "ours"):
        prefill_times = decode_times = site.measured.affine
        overhead = site.measured.overhead_s
    nic = catalogue.links[site.link].gb_s.value * 1e9
    fleet = Disaggregated(
        prefill,
        decode,
        prefill_times,
        decode_times,
        memory_of(hbm),
        cache_tokens=prefiller.kv_tokens,
        layers=shape.layers,
        wire_bytes=wire,
        prefill_links=(*(figure.value * 1e9 * site.gddr_cards for figure in bus), nic),
        decode_links=(nic,),
        layered=system == "ours",
        chunk_tokens=site.chunk_tokens,
        overhead_s=overhead,
    )
    used = (*prefill_times.used, *decode_times.used, catalogue.links[site.link].gb_s, *bus)
    return _priced(catalogue, site, system, prefill, decode, fleet, used)


def memory_of(times: Roofline) -> KVMemory:
    """Of an instance. Decode's own tokens are FP8 where pages are, and BF16 otherwise."""
    new: KVFormat = "fp8" if times.kv == "fp8" else "bf16"
    prompt = times.shape.kv_bytes(1, times.kv)
    return KVMemory(times.kv_tokens * prompt, prompt, times.shape.kv_bytes(1, new))


def _priced(
    catalogue: Catalogue,
    site: Site,
    system: System,
    prefill: int,
    decode: int,
    fleet: Colocated | Disaggregated,
    used: Iterable[Figure],
) -> Offer:
    """A NIC for each instance that sends or receives pages; a host's share for each card."""
    heterogeneous = system.startswith("hetero") or system == "ours"
    gddr = prefill * site.gddr_cards if heterogeneous else 0
    hbm = (decode + (0 if heterogeneous else prefill)) * site.hbm_cards
    cards = price = watts = 0.0
    figures = list(used)
    for name, number in ((site.hbm, hbm), (site.gddr, gddr)):
        if number:
            card = catalogue.card(name)
            around = catalogue.hosts[HOSTS[card.vendor]]
            cards += number * card.price_usd.value
            price += number * around.price_usd.value
            watts += number * (card.watts.value + around.watts.value)
            figures += [card.price_usd, around.price_usd]
    if prefill:
        nic = catalogue.links[site.link].price_usd
        price += (prefill + decode) * nic.value
        figures.append(nic)
    return Offer(
        system, prefill, decode, fleet, cards + price, cards, watts, tuple(dict.fromkeys(figures))
    )
