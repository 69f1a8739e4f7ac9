"""The protocol between prefill and decode under any order of events."""

import itertools
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sglang_hma.config import HmaConfig
from sglang_hma.launch.environment import VARIABLES

from .protocol_decode import Decode
from .protocol_prefill import Prefill, PrefillHalf
from .protocol_servers import Request
from .protocol_tables import left_over
from .protocol_world import Write, simulated
from .real_managers import settings

SOAK = bool(os.environ.get("HMA_SOAK"))
INDEX = st.integers(0, 2**16)
HEALED_S = 1200.0  # after this everything has ended


class Protocol(RuleBasedStateMachine):
    """`windowed`: both servers have a second pool, of which a prompt's last window is sent."""

    windowed = False

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.world = self.stack.enter_context(simulated(windowed=self.windowed))
        self.prefill, self.decode = Prefill(self.world), Decode(self.world)
        self.requests: list[Request] = []

    # -- requests --

    @rule(
        pages=st.integers(1, 6),
        chunk=st.integers(1, 6),
        part_full=st.booleans(),
        lost=st.sampled_from(["", "", "", "", "", "prefill", "decode"]),
        decode_first=st.booleans(),
    )
    def request(
        self, pages: int, chunk: int, part_full: bool, lost: str, decode_first: bool
    ) -> None:
        """The router sends a request's halves to both servers, or loses one."""
        if sum(bool(one.waits) for one in self.requests) >= 8:
            return
        made = Request(next(self.world.numbers), pages, chunk, part_full)
        self.requests.append(made)
        sides = {"prefill": self.prefill, "decode": self.decode}
        for side in sorted(sides, reverse=not decode_first):
            if side != lost:
                sides[side].start(made)

    @precondition(lambda self: self.decode.waiting or self.decode.queue.queue)
    @rule(which=INDEX)
    def abort_by_decode(self, which: int) -> None:
        halves = self.decode.waiting + [each.req.half for each in self.decode.queue.queue]
        halves[which % len(halves)].abort()

    @precondition(lambda self: self.between_passes())
    @rule(which=INDEX)
    def abort_by_prefill(self, which: int) -> None:
        halves = self.between_passes()
        halves[which % len(halves)].abort()

    @precondition(lambda self: self.decode.running)
    @rule(which=INDEX)
    def finish(self, which: int) -> None:
        running = self.decode.running
        self.decode.finish(running[which % len(running)])

    # -- servers --

    def between_passes(self) -> list[PrefillHalf]:
        return [half for half in self.prefill.halves if half.gate is None]

    def computing(self) -> list[PrefillHalf]:
        return [half for half in self.prefill.halves if half.gate is not None]

    @precondition(lambda self: self.computing())
    @rule(which=INDEX)
    def layer(self, which: int) -> None:
        halves = self.computing()
        halves[which % len(halves)].layer()

    @precondition(lambda self: self.computing())
    @rule(which=INDEX)
    def forward_fails(self, which: int) -> None:
        halves = self.computing()
        halves[which % len(halves)].fail_forward()

    @rule()
    def prefill_turn(self) -> None:
        self.prefill.turn()

    @rule()
    def decode_turn(self) -> None:
        self.decode.turn()

    @rule()
    def send_step(self) -> None:
        self.prefill.sender.thread.step()

    @precondition(lambda self: self.prefill.hashing.waiting)
    @rule()
    def hashes(self) -> None:
        self.prefill.hashing.work()

    @rule(rounds=st.integers(1, 12))
    def all_goes_well(self, rounds: int) -> None:
        """Nothing is late or lost for a while, but for what a cut holds up."""
        for _ in range(rounds):
            self.round()

    @rule(seed=st.integers(0, 2**32 - 1), rounds=st.integers(1, 40), harm=st.floats(0.01, 0.3))
    def a_bad_night(self, seed: int, rounds: int, harm: float) -> None:
        """Everything goes on, in any order, and anything is late, lost, doubled or wrong."""
        rng = random.Random(seed)
        for _ in range(rounds):
            self.round(rng, harm)
            self.step_of_time(rng.choice((0.01, 0.5, 2.0)))
            for write in self.world.orphans():
                if rng.random() < 0.1:
                    self.world.move(write, given_up=rng.random() < 0.2)

    def round(self, rng: random.Random | None = None, harm: float = 0.0) -> None:
        """What both servers do at a time, and what becomes of all that is on its way."""
        self.decode.turn()
        self.prefill.turn()
        for half in self.computing():
            half.layer()
        self.prefill.sender.thread.step()
        self.prefill.hashing.work()
        if not self.world.cut:
            for write in self.world.running():
                self.end_write(write, rng, harm)
            self.prefill.sender.thread.step()
            wire = self.world.wire
            for _ in range(len(wire)):
                index = rng.randrange(len(wire)) if rng and rng.random() < harm else 0
                chance = rng.random() if rng else 1.0
                if chance < harm / 4:
                    self.world.drop(index)
                elif chance < harm / 2:
                    wire.append(wire.pop(index))
                else:
                    self.world.deliver(index, again=chance < harm)
        while self.world.parked:
            thread = self.world.parked.pop(0)
            if thread.name == "abort_at_prefill":
                thread.target(*thread.args)

    def end_write(self, write: Write, rng: random.Random | None, harm: float) -> None:
        chance = rng.random() if rng else 1.0
        if chance < harm / 6:
            self.world.fail(write, stored=chance < harm / 32, orphan=chance < harm / 7)
        elif chance > harm:  # else it goes on
            write.flips |= bool(rng and rng.random() < harm / 2)
            self.world.land(write)

    # -- messages --

    @precondition(lambda self: self.world.wire and not self.world.cut)
    @rule(which=INDEX, again=st.booleans())
    def deliver(self, which: int, again: bool) -> None:
        self.world.deliver(which % len(self.world.wire), again=again)

    @precondition(lambda self: self.world.wire)
    @rule(which=INDEX)
    def drop(self, which: int) -> None:
        self.world.drop(which % len(self.world.wire))

    @rule()
    def cut(self) -> None:
        self.world.cut = not self.world.cut

    # -- writes --

    @precondition(lambda self: self.world.running() and not self.world.cut)
    @rule(which=INDEX)
    def write_lands(self, which: int) -> None:
        running = self.world.running()
        self.world.land(running[which % len(running)])

    @precondition(lambda self: self.world.running())
    @rule(which=INDEX, how=st.sampled_from(["stored", "lost", "late", "late"]))
    def write_fails(self, which: int, how: str) -> None:
        running = self.world.running()
        write = running[which % len(running)]
        self.world.fail(write, stored=how == "stored", orphan=how == "late")

    @precondition(lambda self: self.world.orphans())
    @rule(which=INDEX, given_up=st.booleans())
    def orphan_moves(self, which: int, given_up: bool) -> None:
        orphans = self.world.orphans()
        self.world.move(orphans[which % len(orphans)], given_up=given_up)

    @precondition(lambda self: self.requests and not self.world.next_flips)
    @rule()
    def bytes_flip(self) -> None:
        self.world.next_flips = True

    # -- time, and the ends of processes --

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 11.0, 35.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        steps = max(1, round(seconds))
        for _ in range(steps):
            self.step_of_time(seconds / steps)

    def step_of_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)
        self.prefill.tick()
        self.decode.tick()

    @rule(orphans=st.booleans())
    def restart_prefill(self, orphans: bool) -> None:
        self.prefill.alive = False
        self.world.end_of(self.prefill, orphans=orphans)
        for half in self.prefill.halves:
            half.request.end("prefill", "died")
        self.prefill = Prefill(self.world)

    @rule()
    def restart_decode(self) -> None:
        self.decode.alive = False
        self.world.end_of(self.decode, orphans=False)
        for one in self.requests:
            if "decode" in one.waits:
                one.end("decode", "died")
        self.decode = Decode(self.world)

    # -- what must hold --

    @invariant()
    def nothing_is_broken(self) -> None:
        assert not self.world.broken, self.world.broken

    def teardown(self) -> None:
        """The network heals, no new request comes: everything ends, and nothing is kept."""
        try:
            self.heal()
        finally:
            self.stack.close()

    def heal(self) -> None:
        self.world.cut = self.world.next_flips = False
        began = self.world.clock.now_s
        for number in itertools.count():
            if self.world.clock.now_s > began + HEALED_S:
                break
            self.round()
            for write in self.world.orphans() if number % 7 == 0 else ():
                self.world.move(write)
            for half in list(self.decode.running):
                self.decode.finish(half)
            self.step_of_time(1.0 if self.world.clock.now_s < began + 60 else 5.0)
        if not self.decode.registration_lost:  # it is sent again when a request has waited in vain
            self.one_that_is_slow_succeeds()
        self.nothing_is_broken()
        waiting = [(one.room, one.waits) for one in self.requests if one.waits]
        assert not waiting, f"these wait for ever: {waiting}"
        for server in (self.prefill, self.decode):
            kept = left_over(server)
            assert not kept, f"{server.role} keeps {str(kept)[:500]}"

    def one_that_is_slow_succeeds(self) -> None:
        """A request that waits for its pass longer than a lease lasts."""
        self.request(pages=4, chunk=2, part_full=True, lost="", decode_first=True)
        slow = self.requests[-1]
        for seconds in range(60):
            self.decode.turn()
            for _ in range(len(self.world.wire)):
                self.world.deliver(0)
            self.step_of_time(1.0)
            if seconds > 40:
                self.round()
        for half in list(self.decode.running):
            self.decode.finish(half)
        assert slow.outcomes == {"prefill": "succeeded", "decode": "succeeded"}


class WindowedProtocol(Protocol):
    windowed = True


@pytest.mark.parametrize("kind", [Protocol, WindowedProtocol])
def test_protocol(as_schedulers: None, kind: type[Protocol]) -> None:
    made = hypothesis_settings(
        max_examples=1000 if SOAK else 50,
        stateful_step_count=120 if SOAK else 50,
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(kind, settings=made)


@contextmanager
def scheduler_settings() -> Iterator[None]:
    environment = {one.name: one.value for one in VARIABLES if one.name.startswith("SGLANG_")}
    with pytest.MonkeyPatch.context() as patch, settings("decode", 8998):
        for name, value in (environment | HmaConfig(role="decode").environment()).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def as_schedulers() -> Iterator[None]:
    with scheduler_settings():
        yield
