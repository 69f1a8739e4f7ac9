"""LayerGate: what is ready when, across threads and device events."""

import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.kvcache.layer_gate import LayerGate


@given(st.integers(1, 40), st.data())
def test_ready_follows_the_layers(layers: int, data: st.DataObject) -> None:
    calls = []
    gate = LayerGate(layers, lambda: calls.append(gate.ready))
    stored = sorted(data.draw(st.sets(st.integers(0, layers - 1))))
    for count, layer in enumerate(stored, 1):
        gate.advance(layer)
        assert gate.ready == layer + 1
        assert len(calls) == count
    gate.finish()
    assert gate.ready == layers and calls[-1] == layers and gate.ended_s is not None
    assert len(gate.layer_times_s) == layers
    assert list(gate.layer_times_s) == sorted(gate.layer_times_s)


class Event:
    done = False

    def query(self) -> bool:
        return self.done


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_device_events_complete_in_order(done: list[bool]) -> None:
    gate = LayerGate(len(done))
    events = [Event() for _ in done]
    for layer, event in enumerate(events):
        gate.advance(layer, event)
    assert gate.ready == 0 and gate.waits_for_device
    for event, flag in zip(events, done, strict=True):
        event.done = flag
    assert gate.ready == next((i for i, flag in enumerate(done) if not flag), len(done))
    for event in events:
        event.done = True
    gate.finish()
    assert gate.ready == len(done) and not gate.waits_for_device


def test_failure_keeps_what_was_ready_and_wakes() -> None:
    woken = threading.Event()
    gate = LayerGate(4, woken.set)
    gate.advance(1)
    woken.clear()
    gate.fail("out of memory")
    gate.fail("second thoughts")
    assert woken.is_set() and gate.error == "out of memory" and gate.ready == 2


def test_a_reader_never_sees_a_layer_too_early(seed: int) -> None:
    rng = random.Random(seed)
    layers = 200
    stored = [False] * layers
    gate = LayerGate(layers)
    wrong: list[int] = []

    def read() -> None:
        while (ready := gate.ready) < layers:
            wrong.extend(i for i in range(ready) if not stored[i])

    reader = threading.Thread(target=read)
    reader.start()
    for layer in range(layers):
        stored[layer] = True
        gate.advance(layer)
        if rng.random() < 0.2:
            time.sleep(1e-4)
    reader.join()
    assert not wrong


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_outside_are_refused(layer: int) -> None:
    with pytest.raises(ValueError, match="of a gate with 3 layers"):
        LayerGate(3).advance(layer)
