"""What checksums cost a transfer: the send thread and the verifier, with and without them.

Two processes in two network namespaces joined by a rate-limited link move one prompt's pages
(--tokens of a model shaped like Qwen3-8B: 36 layers, 8 KV heads of 128, BFP8) through Mooncake's
TCP transport. Timed from the first write until decode has everything, or has verified it. Rounds
with and without checksums take turns. Needs root.
"""

import multiprocessing
import os
import random
import statistics
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmark.common import Figure, Timing, console, finish, interleave, parser, table
from benchmark.transfer.link import DECODE_IP, PREFILL_IP, link, run
from hma_kernels import PAGE, TILE, TILE_BYTES
from sglang_hma.kvcache.layer_gate import LayerGate
from sglang_hma.transfer.integrity import HostMemory, Verifier, digests
from sglang_hma.transfer.messages import Landed
from sglang_hma.transfer.page_slices import Buffers, page_runs, slice_pairs
from sglang_hma.transfer.prefill.jobs import Group, Job, LayerRange
from sglang_hma.transfer.prefill.link import MooncakeLink
from sglang_hma.transfer.prefill.link_model import GroupSizer
from sglang_hma.transfer.prefill.send_thread import SendThread

LAYERS, KV_HEADS, HEAD_DIM = 36, 8, 128
PAGE_BYTES = KV_HEADS * HEAD_DIM // TILE * TILE_BYTES
RATES = {"1 Gbit/s": 1e9, "4 Gbit/s": 4e9, "unlimited": None}
ROOM = 1


def engine_and_pages(namespace: str, ip: str, pages: int, seed: int) -> tuple[Any, np.ndarray]:
    """A Mooncake engine inside a namespace, with [2 * layers, pages, bytes] registered."""
    with open(f"/run/netns/{namespace}") as handle:
        os.setns(handle.fileno(), os.CLONE_NEWNET)
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize(ip, "P2PHANDSHAKE", "tcp", "") != 0:
        raise RuntimeError(f"Mooncake does not start on {ip}")
    data = np.random.default_rng(seed).integers(
        0, 256, (2 * LAYERS, pages, PAGE_BYTES), dtype=np.uint8
    )
    if engine.register_memory(int(data.ctypes.data), data.nbytes) != 0:
        raise RuntimeError("Mooncake does not register the pages")
    return engine, data


def buffers(data: np.ndarray) -> Buffers:
    return Buffers(tuple(int(buffer.ctypes.data) for buffer in data), (PAGE_BYTES,) * len(data))


def decode_process(namespace: str, pages: int, pipe: Connection) -> None:
    """Compares each range that has landed; answers True once a round's pages are all there."""
    engine, data = engine_and_pages(namespace, DECODE_IP, pages, 1)
    pipe.send((f"{DECODE_IP}:{engine.get_rpc_port()}", buffers(data).addresses))
    verifier = Verifier([buffers(data)], HostMemory())
    while (message := pipe.recv()) is not None:
        if isinstance(message, Landed):
            if verifier.compare(message, "") is not None:
                raise RuntimeError("a page differs")
            if verifier.complete(ROOM):
                pipe.send(True)
        elif message == "plain":
            pipe.send(True)
        else:
            verifier.expect(ROOM, message, [np.arange(pages, dtype=np.int32)], 1)


class Sender:
    """A listener that announces what has landed, as PrefillSender does, over a pipe."""

    def __init__(self, namespace: str, pages: int, pipe: Connection) -> None:
        engine, self.data = engine_and_pages(namespace, PREFILL_IP, pages, 2)
        self.pipe = pipe
        self.session, targets = pipe.recv()
        self.memory = HostMemory()
        self.slices = slice_pairs(buffers(self.data), targets, prefill=(0, 1), decode=(0, 1))
        self.pages = np.arange(pages, dtype=np.int32)
        self.runs = page_runs(self.pages, self.pages)
        self.generation: int | None = None
        self.failed = ""
        self.done = threading.Event()
        self.cpu_s = 0.0
        self.thread = SendThread(MooncakeLink(engine), self, GroupSizer())
        self.thread.start()

    def transfer(self, checksums: bool) -> float:
        """Seconds until decode has every page."""
        self.generation = random.getrandbits(60) if checksums else None
        if checksums:
            self.pipe.send(self.generation)
        self.done.clear()
        begin = time.perf_counter()
        gate = LayerGate.open(LAYERS)
        self.thread.put(Job(ROOM, self.session, 0, self.runs, self.slices, gate, last=True))
        self.done.wait()
        if self.failed:
            raise RuntimeError(self.failed)
        if not checksums:
            self.pipe.send("plain")
        self.pipe.recv()
        return time.perf_counter() - begin

    def is_cancelled(self, room: int) -> bool:
        return bool(self.failed)

    def on_submitted(self, layers: LayerRange) -> Landed | None:
        if self.generation is None:
            return None
        began = time.thread_time()
        made = digests(self.memory, [pair.source for pair in layers.slices], self.pages)
        self.cpu_s += time.thread_time() - began
        span = (layers.first_layer, layers.layers, 0, len(self.pages))
        return Landed(ROOM, self.generation, 0, *span, made)

    def on_group_done(self, group: Group, now_s: float) -> None:
        pass

    def on_acked(self, layers: LayerRange) -> None:
        if layers.announcement is not None:
            self.pipe.send(layers.announcement)

    def on_done(self, job: Job) -> None:
        self.done.set()

    def on_failed(self, job: Job, reason: str, *, by_peer: bool) -> None:
        self.failed = reason

    def on_tick(self) -> None:
        pass


def main() -> None:
    options = parser(__doc__ or "")
    options.set_defaults(rounds=15)
    options.add_argument("--tokens", type=int, default=2048, help="prompt tokens to move")
    run(options, measure)


def measure(args: Any) -> None:
    pages = -(-args.tokens // PAGE)
    total = 2 * LAYERS * pages * PAGE_BYTES
    context = multiprocessing.get_context("spawn")
    with link() as road:
        here, there = context.Pipe()
        decode = context.Process(target=decode_process, args=(road.decode, pages, there))
        decode.start()
        made: list[Sender] = []
        # Mooncake's threads must be born inside the namespace; this thread stays outside.
        starter = threading.Thread(target=lambda: made.append(Sender(road.prefill, pages, here)))
        starter.start()
        starter.join()
        sender = made[0]
        rows, records, figures = [], {}, []
        try:
            for name, rate in RATES.items():
                console.print(name, style="dim")
                road.set_rate(rate)
                goodput = road.goodput(min(400, (rate or 8e9) / 8e6))
                times = interleave(
                    {
                        "off": lambda: sender.transfer(False),
                        "on": lambda: sender.transfer(True),
                    },
                    args.rounds,
                )
                cost = 1 / times["on"].times_faster_than(times["off"]) - 1
                rows.append(row(name, times, cost, total, goodput))
                seconds = {key: timing.rounds for key, timing in times.items()}
                records[name] = {"seconds": seconds, "goodput_bytes_per_s": goodput}
                figures.append(
                    Figure(f"checksums on / off, {name}", 1 + cost, 1.03, at_least=False)
                )
        finally:
            here.send(None)
            decode.join(10)
    table(
        f"{total / 1e6:.0f} MB of pages, {args.rounds} rounds turn about",
        ["link", "off, ms", "on, ms", "cost", "of one TCP stream's goodput (off)"],
        rows,
    )
    hashing = statistics.mean([sender.cpu_s / (len(RATES) * (args.rounds + 1))])
    print(f"hashing takes {total / hashing / 1e9:.1f} GB/s of one core on each side")
    finish(args, {"bytes": total, "measured": records}, figures)


def row(name: str, times: dict[str, Timing], cost: float, total: int, goodput: float) -> list[str]:
    cells = [f"{t.median * 1e3:.0f} ±{t.spread:.0%}" for t in times.values()]
    share = total / times["off"].median / goodput
    return [name, *cells, f"{cost:+.1%}", f"{share:.0%}"]


if __name__ == "__main__":
    main()
