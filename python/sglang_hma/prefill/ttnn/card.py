"""Tenstorrent cards: opening, closing, their memory, and what is wrong if there is none."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

QUEUES = 2  # commands; copies to the host beside them
COMPUTE, COPY = range(QUEUES)
TRACE_BYTES = 256 << 20  # of a chip's memory, for the commands of captured traces
TTNN_PYTHON = (3, 12)  # ttnn 0.81.1 has a wheel for no other that is supported here


class CardError(RuntimeError):
    """No card, or one that cannot serve, in one line."""


@dataclass(frozen=True)
class Dram:
    """Bytes of one chip's memory, all banks together."""

    total: int
    free: int


@dataclass
class Card:
    """An open mesh, a row of chips, with a command queue for compute and one for copies."""

    device: Any

    @property
    def chips(self) -> int:
        return int(self.device.get_num_devices())

    @property
    def arch(self) -> str:
        return str(self.device.arch()).rpartition(".")[2].lower()

    @property
    def dram(self) -> Dram:
        import ttnn

        view = ttnn.get_memory_view(self.device, ttnn.BufferType.DRAM)
        banks = view.num_banks
        return Dram(
            total=view.total_bytes_per_bank * banks,
            free=view.total_bytes_free_per_bank * banks,
        )

    @property
    def programs(self) -> int:
        """Compiled programs so far: a shape that was seen before adds none."""
        return int(self.device.num_program_cache_entries())

    def wait(self) -> None:
        """Until everything that was enqueued has been computed. Reading a tensor waits for that
        too, but holds the interpreter's lock meanwhile, so that no other thread runs: neither the
        one that passes layers on nor the one that sends them."""
        import ttnn

        ttnn.event_synchronize(ttnn.record_event(self.device, COMPUTE))

    def tensor(self, value: Any, dtype: Any, layout: Any) -> Any:
        """A torch tensor on every chip, in DRAM."""
        import ttnn

        everywhere = ttnn.ReplicateTensorToMesh(self.device)
        return ttnn.from_torch(
            value, dtype=dtype, layout=layout, device=self.device, mesh_mapper=everywhere
        )

    def close(self) -> None:
        import ttnn

        linked = self.chips > 1
        ttnn.close_mesh_device(self.device)
        if linked:
            ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)


def cache_folder() -> Path:
    """Where the runtime keeps files of its own."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sglang_hma" / "ttnn"


def visible_cards() -> list[int]:
    """Numbers of the cards that the kernel driver shows."""
    nodes = Path("/dev/tenstorrent")
    if not nodes.is_dir():
        return []
    return sorted(int(node.name) for node in nodes.iterdir() if node.name.isdecimal())


def stands_in() -> bool:
    """Whether the vendor's simulator or a described card without silicon takes a card's place."""
    return any(
        os.environ.get(name) for name in ("TT_METAL_SIMULATOR", "TT_METAL_MOCK_CLUSTER_DESC_PATH")
    )


def described_only() -> bool:
    """Whether cards are described to ttnn that are not there: nothing computes, and a trace cannot
    be captured."""
    return bool(os.environ.get("TT_METAL_MOCK_CLUSTER_DESC_PATH"))


def why_no_ttnn(python: tuple[int, int] = sys.version_info[:2]) -> str:
    """What to do where ttnn is not installed."""
    if python == TTNN_PYTHON:
        return "ttnn is not installed: make venv"
    here, there = (".".join(map(str, version)) for version in (python, TTNN_PYTHON))
    return f"ttnn has no wheel for Python {here}: make venv PYTHON={there}"


def require_cards(device_ids: Sequence[int]) -> None:
    """Raises CardError if this host lacks one of the cards or ttnn; opens nothing."""
    if find_spec("ttnn") is None:
        raise CardError(f"--hma-prefill-runtime is ttnn: {why_no_ttnn()}")
    if not stands_in():
        cards = visible_cards()
        if not cards:
            raise CardError(
                "no Tenstorrent card: /dev/tenstorrent is empty; is the card in, and its kernel "
                "driver (tt-kmd) loaded?"
            )
        lacking = sorted(set(device_ids) - set(cards))
        if lacking:
            shown = ", ".join(map(str, cards))
            raise CardError(f"--hma-device-ids has {lacking[0]}: this host has cards {shown}")


def open_card(device_ids: Sequence[int] = (0,), chips: int = 1) -> Card:
    """A mesh of `chips` chips of these cards. Raises CardError with the reason and the remedy."""
    require_cards(device_ids)
    numbers = ",".join(map(str, device_ids))
    # ttnn numbers the cards that it may see from 0.
    if "TT_VISIBLE_DEVICES" not in os.environ and not stands_in():
        os.environ["TT_VISIBLE_DEVICES"] = numbers
    # Else ttnn writes a folder "generated" where the server was started.
    os.environ.setdefault("TT_METAL_LOGS_PATH", str(cache_folder() / "logs"))
    import ttnn

    try:
        if chips > 1:
            ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_1D)
        device = ttnn.open_mesh_device(
            ttnn.MeshShape(1, chips), num_command_queues=QUEUES, trace_region_size=TRACE_BYTES
        )
    except RuntimeError as error:
        mesh = f" as a mesh of {chips} chips" if chips > 1 else ""
        raise CardError(f"card {numbers} does not open{mesh}: {reason(error)}") from error
    return Card(device)


def reason(error: Exception) -> str:
    """The vendor's message without its file names and backtrace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[lines.index("info:") + 1 :] if "info:" in lines else lines
    message = told[0] if told else type(error).__name__
    if "sfpi" in message:
        message += "; install the vendor's sfpi package of the release in ttnn's sfpi-version file"
    return message


@contextlib.contextmanager
def opened(device_ids: Sequence[int] = (0,), chips: int = 1) -> Iterator[Card]:
    card = open_card(device_ids, chips)
    try:
        yield card
    finally:
        card.close()
