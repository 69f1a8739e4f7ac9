"""Pages of failed requests: never given away while a byte may still come, and not kept after."""

from dataclasses import dataclass, field

import pytest

from sglang_hma.transfer import drain
from sglang_hma.transfer.decode import quarantine
from sglang_hma.transfer.decode.quarantine import COPY_S, ORPHAN_S, Quarantine
from sglang_hma.transfer.drain import Drain
from sglang_hma.transfer.tcp_table import FIN_WAIT1, Connection

HERE, THERE, NEIGHBOUR = "10.0.0.2", "10.0.0.1", "10.0.0.3"
PORT = 15500
ROOM = 7


def incoming(
    peer: str = THERE, port: int = 40000, *, unread: int = 0, here: str = HERE, inode: int = 5
) -> Connection:
    return Connection((here, PORT), (peer, port), 1, 0, unread, inode)


@dataclass
class World:
    now: float = 1000.0
    rows: list[Connection] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kept = Quarantine({PORT}, lambda: {THERE, NEIGHBOUR}, lambda: self.rows)

    def safe(self, *, confirmed: bool = False, gone: set[str] | None = None) -> bool:
        """After enough time for another look at the table, but no more."""
        self.now += 2 * quarantine.LOOK_S
        return self.kept.is_safe(ROOM, confirmed=confirmed, gone=gone)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    for module in (drain, quarantine):
        monkeypatch.setattr(module.time, "monotonic", lambda: made.now)
    return made


def test_time_alone_frees_nothing(world: World) -> None:
    for _ in range(100):
        world.now += 3600
        assert not world.safe()


def test_confirmed_pages_are_kept_until_what_has_come_is_read(world: World) -> None:
    """A server that was stopped finds the confirmation and the bytes at the same time. What has
    just been read may be on its way to a device."""
    world.rows = [incoming(unread=4096), incoming(NEIGHBOUR)]
    assert not world.safe(confirmed=True)
    world.now += 3600
    assert not world.safe(confirmed=True)
    world.rows[0] = incoming()
    assert not world.safe(confirmed=True)
    world.now += COPY_S
    assert world.safe(confirmed=True)


def test_confirmed_pages_are_kept_until_a_device_has_them(world: World) -> None:
    assert not world.safe(confirmed=True)
    world.now += COPY_S
    assert world.safe(confirmed=True)


def test_a_dead_peers_connections_have_to_end(world: World) -> None:
    """Those of a neighbour do not, nor do new ones."""
    world.rows = [incoming(), incoming(NEIGHBOUR)]
    assert not world.safe(gone={THERE})
    world.now += ORPHAN_S / 2
    assert not world.safe(gone={THERE})
    world.rows = [incoming(NEIGHBOUR), incoming(port=40001)]
    assert not world.safe(gone={THERE})
    world.now += COPY_S
    assert world.safe(gone={THERE})


def test_a_dead_peers_connections_do_not_outlive_linuxs_orphans(world: World) -> None:
    world.rows = [incoming()]
    assert not world.safe(gone={THERE})
    world.now += ORPHAN_S
    assert not world.safe(gone={THERE})  # the copy
    world.now += COPY_S
    assert world.safe(gone={THERE})


def test_connections_from_unknown_addresses_may_be_the_dead_peers(world: World) -> None:
    world.rows = [incoming("192.168.1.1")]
    assert not world.safe(gone={THERE})
    world.now += ORPHAN_S / 2
    assert not world.safe(gone={THERE})


@pytest.mark.parametrize("alive", [False, True])
def test_on_one_host_the_other_end_tells(world: World, alive: bool) -> None:
    """A connection whose other end a process holds is not of the process that has ended."""
    here = incoming(HERE, here=HERE)
    state, inode = (1, 9) if alive else (FIN_WAIT1, 0)
    world.rows = [here, Connection(here.remote, here.local, state, 100, 0, inode)]
    assert not world.safe(gone={HERE})
    world.now += COPY_S
    assert world.safe(gone={HERE}) == alive


def test_a_drain_waits_for_the_network_when_a_connection_is_given_up(world: World) -> None:
    """Linux forgets it with bytes that were not acknowledged; packets may still be under way."""
    unsent = Connection((THERE, 40000), (HERE, PORT), FIN_WAIT1, 100, 0, 0)
    waiting = Drain([unsent], lambda each: each.sending, least_s=10)
    world.now += 100
    assert not waiting.update([unsent])
    assert not waiting.update([])
    world.now += 9
    assert not waiting.update([])
    world.now += 2
    assert waiting.update([])
