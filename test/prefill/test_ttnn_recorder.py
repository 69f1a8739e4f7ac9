"""What a recorded ttnn counts for single calls (benchmark/tenstorrent), against closed forms."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmark.tenstorrent.module import UnknownOperation, recording
from benchmark.tenstorrent.predicted import Rates, linked, operation_s, predict, rates

BFP8, BF16 = 1088, 2048  # bytes of a tile of 32 x 32
ON = Rates(
    *("a card", 1),
    **{"lofi": 8e12, "dram": 1e9, "pcie": 1e8, "memory": 1e9, "link": 1e9},
    **{"program_s": 1e-3, "host_call_s": 1e-2},
)


@pytest.fixture
def ttnn() -> Any:
    """A recorder's module, and the recorder."""
    with recording() as recorder:
        yield importlib.import_module("ttnn"), recorder


def tensor(ttnn: Any, *shape: int, packed: bool = False, l1: bool = False, rows: bool = False):
    return ttnn.from_torch(
        torch.empty(shape, device="meta"),
        dtype=ttnn.bfloat8_b if packed else ttnn.bfloat16,
        layout=ttnn.ROW_MAJOR_LAYOUT if rows else ttnn.TILE_LAYOUT,
        device=ttnn.open_device(0),
        memory_config=ttnn.L1_MEMORY_CONFIG if l1 else ttnn.DRAM_MEMORY_CONFIG,
    )


def integers(ttnn: Any, *values: int) -> Any:
    return ttnn.from_torch(torch.tensor(values), dtype=ttnn.int32, device=ttnn.open_device(0))


def exactly(ttnn: Any, fidelity: str) -> Any:
    return ttnn.init_device_compute_kernel_config("any", math_fidelity=fidelity)


def test_a_product(ttnn: Any) -> None:
    ttnn, recorder = ttnn
    x, w = tensor(ttnn, 1, 1, 33, 96), tensor(ttnn, 96, 160, packed=True)
    recorder.take()
    y = ttnn.linear(x, w, dtype=ttnn.bfloat16, compute_kernel_config=exactly(ttnn, "HiFi2"))
    (call,) = recorder.take()
    assert y.shape == (1, 1, 33, 160) and y.padded_shape == (1, 1, 64, 160)
    assert (call.flops, call.fidelity) == (2 * 64 * 96 * 160, "HiFi2")
    assert call.reads == 2 * 3 * BF16 + 3 * 5 * BFP8 and call.writes == 2 * 5 * BF16
    assert call.weights == ((w.number, 15 * BFP8),) and call.host == call.programs == 1
    # Two passes of the engine; 1 GB/s of DRAM.
    expected = max(call.flops / 4e12, (call.reads + call.writes) / 1e9) + 1e-3
    assert operation_s(call, ON) == pytest.approx(expected)


def test_what_lies_in_l1_costs_no_dram(ttnn: Any) -> None:
    ttnn, recorder = ttnn
    x, w = tensor(ttnn, 1, 1, 32, 64, l1=True), tensor(ttnn, 64, 64, packed=True)
    recorder.take()
    assert ttnn.add(x, x).memory_config() == ttnn.L1_MEMORY_CONFIG
    assert ttnn.linear(x, w).memory_config() == ttnn.DRAM_MEMORY_CONFIG
    near = ttnn.linear(x, w, memory_config=ttnn.L1_MEMORY_CONFIG)
    assert near.memory_config() == ttnn.L1_MEMORY_CONFIG
    added, far, kept = recorder.take()
    assert (added.reads, added.writes) == (0, 0)
    assert (far.reads, far.writes) == (4 * BFP8, 2 * BF16)
    assert (kept.reads, kept.writes) == (4 * BFP8, 0)
    assert [each.memory for each in kept.operands] == ["L1", "DRAM"]


@pytest.mark.parametrize("wide", [32, 128])
@pytest.mark.parametrize("start", [0, 128, 256])
def test_attention(ttnn: Any, start: int, wide: int) -> None:
    ttnn, recorder = ttnn
    rows, heads, dim = 256, 4, 64
    q = tensor(ttnn, 1, heads, rows, dim)
    k, v = (tensor(ttnn, 20, 2, 32, dim, packed=True) for _ in range(2))
    table, first = integers(ttnn, *range(16)), integers(ttnn, start)
    recorder.take()
    out = ttnn.transformer.chunked_scaled_dot_product_attention(
        *(q, k, v, table),
        chunk_start_idx_tensor=first,
        program_config=ttnn.SDPAProgramConfig(q_chunk_size=wide, k_chunk_size=wide),
        compute_kernel_config=exactly(ttnn, "HiFi3"),
    )
    (call,) = recorder.take()
    assert out.shape == q.shape
    # Chunk i of queries goes over start + (i + 1) * wide keys, in both products.
    chunks = rows // wide
    keys = chunks * start + wide * chunks * (chunks + 1) // 2
    assert call.flops == heads * 2 * 2 * wide * dim * keys
    own = heads * rows // 32 * dim // 32 * BF16
    streamed = heads * keys // 32 * dim // 32 * 2 * BFP8
    assert call.reads == own + table.dram + streamed and call.writes == own


def test_bytes_of_other_operations(ttnn: Any) -> None:
    ttnn, recorder = ttnn
    table, x = tensor(ttnn, 512, 64, rows=True), tensor(ttnn, 1, 1, 32, 256)
    ids = ttnn.from_torch(torch.zeros(1, 32), dtype=ttnn.uint32, device=ttnn.open_device(0))
    cache, new = (tensor(ttnn, n, 2, 32, 64, packed=True) for n in (50, 1))
    recorder.take()
    ttnn.embedding(ids, table, layout=ttnn.TILE_LAYOUT, dtype=ttnn.bfloat16)
    ttnn.typecast(x, ttnn.bfloat8_b)
    ttnn.experimental.paged_fill_cache(cache, new, integers(ttnn, 3), batch_idx=0)
    ttnn.reshape(x, (1, 8, 32, 32))
    ttnn.reshape(x, (1, 1, 1, 32, 256))
    part = ttnn.slice(x, [0, 0, 0, 0], [1, 1, 32, 128])
    ttnn.concat([part, x], dim=-1)
    moved = [(c.reads, c.writes) for c in recorder.take() if c.kind != "upload"]
    assert moved == [
        (32 * 4 + 32 * 64 * 2, 2 * BF16),
        (8 * BF16, 8 * BFP8),
        (4 * BFP8 + 4, 4 * BFP8),
        (8 * BF16, 8 * BF16),
        (0, 0),
        (4 * BF16, 4 * BF16),
        (12 * BF16, 12 * BF16),
    ]


def test_an_operation_that_nobody_described_fails_by_its_name(ttnn: Any) -> None:
    ttnn, _ = ttnn
    with pytest.raises(UnknownOperation, match=r"ttnn\.experimental\.frobnicate .*operations\.py"):
        ttnn.experimental.frobnicate(1)
    with pytest.raises(UnknownOperation, match=r"ttnn\.frobnicate "):
        ttnn.frobnicate(1)


def test_a_replayed_trace_is_one_call_of_the_host(ttnn: Any) -> None:
    ttnn, recorder = ttnn
    device = ttnn.open_device(0)
    x, w = tensor(ttnn, 1, 1, 32, 64), tensor(ttnn, 64, 64, packed=True)
    q, kv = tensor(ttnn, 1, 2, 64, 32), tensor(ttnn, 20, 2, 32, 32, packed=True)
    table, first = integers(ttnn, *range(16)), integers(ttnn, 0)

    def work() -> None:
        ttnn.linear(x, w)
        ttnn.transformer.chunked_scaled_dot_product_attention(
            q, kv, kv, table, chunk_start_idx_tensor=first
        )

    recorder.take()
    trace = ttnn.begin_trace_capture(device, cq_id=0)
    work()
    with pytest.raises(RuntimeError, match="while a trace is captured"):
        integers(ttnn, 1)
    ttnn.end_trace_capture(device, trace, cq_id=0)
    assert [call.name for call in recorder.take()] == ["begin_trace_capture", "end_trace_capture"]
    ttnn.execute_trace(device, trace, cq_id=0, blocking=False)
    replayed = recorder.take()
    work()
    plain = recorder.take()
    assert sum(call.host for call in replayed) == 1 and sum(call.host for call in plain) == 2
    assert [(c.name, c.flops, c.reads) for c in replayed[1:]] == [
        (c.name, c.flops, c.reads) for c in plain
    ]
    later = ttnn.from_torch(torch.tensor([256]), dtype=ttnn.int32)
    ttnn.copy_host_to_device_tensor(later, first, cq_id=0)
    ttnn.execute_trace(device, trace, cq_id=0, blocking=False)
    *_, attention = recorder.take()
    assert attention.flops == 4 * 2 * 32 * 32 * (2 * 256 + 32 + 64)
    assert attention.flops > plain[1].flops


def test_a_programs_key_is_its_shapes_and_options(ttnn: Any) -> None:
    ttnn, recorder = ttnn
    x, y = (tensor(ttnn, 1, 1, 64, n) for n in (64, 128))
    steps: list[tuple[Callable[[], Any], int]] = [
        (lambda: ttnn.add(x, x), 1),
        (lambda: ttnn.add(x, x), 0),
        (lambda: ttnn.add(y, y), 1),
        (lambda: ttnn.slice(x, [0, 0, 0, 0], [1, 1, 32, 64]), 1),
        (lambda: ttnn.slice(x, [0, 0, 32, 0], [1, 1, 64, 64]), 1),
        (lambda: ttnn.add(x, x, memory_config=ttnn.L1_MEMORY_CONFIG), 1),
    ]
    for run, new in steps:
        before = len(recorder.programs)
        run()
        assert len(recorder.programs) - before == new


def test_host_and_card_go_side_by_side(ttnn: Any) -> None:
    ttnn, recorder = ttnn
    device = ttnn.open_device(0)
    x, y = tensor(ttnn, 1, 1, 32, 32), tensor(ttnn, 1, 1, 1024, 1024)
    host = ttnn.allocate_tensor_on_host(ttnn.Shape(x.shape), ttnn.bfloat16, x.layout, device)
    recorder.take()
    ttnn.add(x, x)
    ttnn.add(y, y)
    ttnn.add(x, x)
    ttnn.copy_device_to_host_tensor(x, host, blocking=False, cq_id=1)
    little, much = 2 * BF16 / 1e9 + 1e-3, 2 * 1024 * BF16 / 1e9 + 1e-3
    done = 1e-2 + 1e-2 + much + little
    plain = predict(recorder.calls, ON)
    assert plain.card == pytest.approx(2 * little + much) and plain.host == pytest.approx(4e-2)
    assert plain.total == pytest.approx(max(done, 4e-2) + BF16 / 1e8)
    ttnn.event_synchronize(ttnn.record_event(device, 0))
    ttnn.from_device(y)
    assert predict(recorder.take(), ON).total == pytest.approx(
        max(done, 6e-2) + 1e-2 + 1024 * BF16 / 1e8
    )


def test_rates_are_the_vendors() -> None:
    """Cores, operations a cycle, clock; the catalogue's memory and bus."""
    for card, cores, clock in (("n150", 72, 1.0), ("p150", 120, 1.35), ("p100", 120, 1.35)):
        assert rates(card).lofi == pytest.approx(cores * 4096 * clock * 1e9, rel=0.005)
    assert rates("n300").lofi == pytest.approx(64 * 4096e9, rel=0.005)
    assert rates("p150").dram == 512e9 and rates("n300").dram == 288e9
    four = rates("p150", cards=4)
    assert (four.chips, four.dram, four.link) == (4, 512e9, 100e9) and not linked("p100")


def test_a_sum_over_chips_goes_over_their_links() -> None:
    with recording() as recorder:
        ttnn = importlib.import_module("ttnn")
        device = ttnn.open_mesh_device(ttnn.MeshShape(1, 4), num_command_queues=2)
        everywhere = ttnn.ReplicateTensorToMesh(device)
        x = ttnn.from_torch(
            torch.zeros(1, 1, 32, 64),
            dtype=ttnn.bfloat16,
            layout=ttnn.TILE_LAYOUT,
            device=device,
            mesh_mapper=everywhere,
        )
        recorder.take()
        ttnn.all_reduce(x)
        (call,) = recorder.take()
    # Three quarters of the tensor leave a chip twice; 1 GB/s of links as of DRAM.
    assert call.link == 2 * 3 * 2 * BF16 // 4 and call.reads == call.writes == 2 * BF16
    assert operation_s(call, ON) == pytest.approx(4 * BF16 / 1e9 + 2e-3)
