"""SGLang's prefill scheduler without a model and without a network.

Admission, chunks, radix cache, locks, releases and aborts are SGLang's own; senders, allocator and
`run_batch` are ours. A page holds the prompt up to the page's last token, so that a page that was
handed out too early shows.
"""

from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.utils import DisaggregationMode, ReqToMetadataIdxAllocator
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_tree_cache
from sglang.srt.runtime_context import get_context, get_parallel, get_server_args
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_hma.kvcache.holds import HoldingAllocator
from sglang_hma.kvcache.layer_gate import GatedPool
from sglang_hma.transfer.endpoints import HmaKVSender
from sglang_hma.transfer.prefill.manager import HmaPrefillManager
from sglang_hma.transfer.prefill.run_batch import run_batch

PAGE = 32
ROWS = 16
SESSION = "10.0.0.2:15001"
Content = tuple[int, ...]


class Mute:
    """Reporters and the like."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@contextmanager
def configured(mode: str = "prefill", **arguments: Any) -> Iterator[None]:
    """What SGLang's scheduler finds in its process: settings, ranks, a process group."""
    given = {"attention_backend": "torch_native", "disaggregation_mode": mode, **arguments}
    with (
        get_context().override_server_args(**given, pp_max_micro_batch_size=ROWS),
        get_parallel().override(tp_rank=0),
    ):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


@dataclass
class Wire:
    """In the PrefillSender's place: what was sent of each room, (page, what it has to hold)."""

    prompts: dict[int, Content] = field(default_factory=dict)
    sent: dict[int, list[tuple[int, Content]]] = field(default_factory=dict)
    claims: Any = field(default_factory=Mute)
    thread: Any = field(default_factory=Mute)

    def is_drained(self, room: int) -> bool:
        return True

    def add(self, room: int, source: Any, index: slice, **_: Any) -> None:
        places = range(index.start, index.stop)
        for page, place in zip(source.tolist(), places, strict=True):
            self.sent[room].append((page, self.prompts[room][: (place + 1) * PAGE]))


def manager() -> HmaPrefillManager:
    """A manager without sockets, whose rooms end when the test says so."""
    made = object.__new__(HmaPrefillManager)
    made._prompt_logprobs = {}
    made.request_status, made.transfer_infos, made.req_to_decode_prefix_len = {}, {}, {}
    made.sender, made.intake = Wire(), Mute()
    made.kv_args = SimpleNamespace(state_types=[])
    made.failure_records = {}
    made.failure_lock, made.session_lock = Lock(), Lock()
    made._staging_outstanding = defaultdict(int)
    made._deferred_ack_targets, made._deferred_ack_poisoned_rooms = {}, set()
    made.failed_sessions, made.state_layout_rejections = set(), {}
    made.deferred_bootstrap = made._staging_ctx = made._dcp_pack_max_tokens = None
    made.sender_trace_module = None
    made.kv_item_lens_sum = made.state_item_lens_sum = 0
    made._kv_replica_factor, made.kv_shard_size = 1, 1
    made.is_dummy_cp_rank = made.enable_all_cp_ranks_for_transfer = False
    made.defer_decode_allocation = made.reports_transfer_latency = False
    made.bootstrap_timeout = 300
    return made


TP_WORKER = SimpleNamespace(
    model_runner=SimpleNamespace(attn_backend=None, prefill_aware_swa=False), is_hybrid_swa=False
)
MODEL_CONFIG = SimpleNamespace(vocab_size=100, is_encoder_decoder=False)


def radix_cache(rows: Any, allocator: Any) -> BasePrefixCache:
    """The one that a server has."""
    no = dict.fromkeys(("is_hybrid_swa", "is_hybrid_ssm", "enable_hierarchical_cache"), False)
    return create_tree_cache(
        TreeCacheBuildContext(
            server_args=get_server_args(),
            params=CacheInitParams(False, rows, allocator, PAGE),
            disable_radix_cache=False,
            tp_worker=TP_WORKER,
            model_config=MODEL_CONFIG,
            tp_size=1,
            tp_rank=0,
            tp_group=None,
            **no,
        )
    )


class PrefillLoop(Scheduler):
    prefill_delayer = min_free_slots_delayer = dynamic_chunk_sizer = dllm_config = None
    kv_checksum_computer = truncation_align_size = mm_receiver = hisparse_coordinator = None
    chunked_req = last_batch = _pending_chunked_abort_req = return_health_check_ipcs = None
    enable_priority_preemption = enable_priority_scheduling = enable_lora = False
    enable_hicache_storage = enable_lmcache = enable_hierarchical_cache = False
    enable_unified_cache_external_linker = enable_staging = enable_hisparse = False
    enable_continuous_input_polling = is_hybrid_swa = is_mixed_chunk = False
    priority_scheduling_preemption_threshold = processed_tokens_counter = max_prefill_bs = 0
    grammar_manager = metrics_reporter = output_streamer = load_inquirer = Mute()
    disagg_metadata_buffers = batch_result_processor = scheduler_stage_metrics = Mute()
    rust_server = metrics_collector = Mute()
    spec_algorithm = SpeculativeAlgorithm.NONE
    disaggregation_mode = DisaggregationMode.PREFILL
    page_size, max_running_requests, max_prefill_tokens = PAGE, ROWS, 1 << 20
    model_config, tp_worker = MODEL_CONFIG, TP_WORKER
    new_token_ratio_tracker = SimpleNamespace(current=0.5)
    beam_coordinator = SimpleNamespace(pending_member_rows=lambda _: 0, retire_group=lambda _: None)
    dp_attn_adapter = SimpleNamespace(maybe_prepare_mlp_sync_batch=lambda batch: batch)

    def __init__(self, pages: int, chunk_pages: int, *, overlap: bool = True) -> None:
        self.enable_overlap = overlap
        # Called in a forward pass, before its layer is stored and after.
        self.before_layer: Callable[[], None] = lambda: None
        self.after_layer: Callable[[], None] = lambda: None
        self.pages, self.chunked_prefill_size = pages, chunk_pages * PAGE
        self.kv = manager()
        self.wire: Wire = self.kv.sender
        self.content: dict[int, Content] = {}
        self.reqs: list[Req] = []
        pool = GatedPool()
        pool.layer_num, pool.device = 1, "cpu"
        self.token_to_kv_pool_allocator = self.allocator = HoldingAllocator(
            pages * PAGE, PAGE, dtype=torch.uint8, device="cpu", kvcache=pool, need_sort=False
        )
        self.req_to_token_pool = ReqToTokenPool(ROWS, 4096, "cpu", False)
        self.tree_cache = self.tree = radix_cache(self.req_to_token_pool, self.allocator)
        self.policy = SchedulePolicy("fcfs", self.tree, False, False, False)
        self.attn_cp_cpu_group = self.attn_tp_cpu_group = dist.group.WORLD
        self.disagg_prefill_bootstrap_queue = SimpleNamespace(kv_manager=self.kv, queue=[])
        self.disagg_prefill_inflight_queue: list[Req] = []
        self.disagg_prefill_pending_chunk_rids: set[str] = set()
        self.req_to_metadata_buffer_idx_allocator = ReqToMetadataIdxAllocator(1 << 10)
        self.waiting_queue: list[Req] = []
        self.running_batch = ScheduleBatch(reqs=[])
        self.result_queue: deque[Any] = deque()

    # -- what happens to it --

    def arrive(self, prompt: Content) -> Req:
        """A request whose decode server has given its pages already."""
        room = len(self.reqs)
        req = Req(
            f"{room}.",
            "",
            array("q", prompt),
            SamplingParams(max_new_tokens=1),
            bootstrap_host="10.0.0.1",
            bootstrap_room=room,
            disagg_mode=DisaggregationMode.PREFILL,
            vocab_size=100,
        )
        self.wire.prompts[room], self.wire.sent[room] = prompt, []
        req.disagg_kv_sender = HmaKVSender(self.kv, "10.0.0.1:1", room)
        self.kv.transfer_infos[room] = {SESSION: SimpleNamespace(is_dummy=False)}
        req.metadata_buffer_index = self.req_to_metadata_buffer_idx_allocator.alloc()
        req.disagg_kv_sender.init(-(-len(prompt) // PAGE), req.metadata_buffer_index)
        self.kv.update_status(room, KVPoll.WaitingForInput)
        self.reqs.append(req)
        self.waiting_queue.append(req)
        return req

    def conclude(self, req: Req, status: int) -> None:
        """The network's threads are done with a request, and the scheduler has not looked yet."""
        self.kv.update_status(req.bootstrap_room, status)

    def abort(self, req: Req) -> None:
        self.abort_request(AbortReq(rid=req.rid))

    def iterate(self, between: Callable[[], None] = lambda: None) -> list[Req]:
        """One turn of event_loop_overlap_disagg_prefill, or of event_loop_normal_disagg_prefill.
        The requests of the batch launched."""
        plan = self.get_next_disagg_prefill_batch_to_run(self.running_batch, self.last_batch)
        self.running_batch, batch = plan.running_batch, plan.batch_to_run
        if batch is not None:
            self.result_queue.append((batch.copy(), run_batch(compute, self, batch)))
        between()
        if (self.last_batch if self.enable_overlap else batch) is not None:
            self.process_batch_result_disagg_prefill(*self.result_queue.popleft())
        between()
        self.process_disagg_prefill_inflight_queue()
        self.last_batch = batch
        return batch.reqs if batch is not None else []

    # -- what can be seen of it --

    def live(self) -> list[Req]:
        """Requests that may still be read by a transfer."""
        return [req for req in self.reqs if req.disagg_kv_sender.conclude_state is None]

    def pages_of(self, req: Req) -> list[int]:
        if not req.kv.holds_kv:
            return []
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        return (row[: req.kv.kv_allocated_len : PAGE] // PAGE).tolist()

    def cached_pages(self) -> list[int]:
        if not self.tree.evictable_size() + self.tree.protected_size():
            return []
        return (self.tree.all_values_flatten()[::PAGE] // PAGE).tolist()

    def idle(self) -> bool:
        queues = self.waiting_queue, self.disagg_prefill_inflight_queue, self.result_queue
        return not any(queues) and self.chunked_req is None and self.last_batch is None


def compute(loop: PrefillLoop, batch: ScheduleBatch) -> GenerationBatchResult:
    """The forward pass; before it, that its pages are nobody else's."""
    reading = {page for req in loop.live() for page, _ in loop.wire.sent[req.bootstrap_room]}
    own = {page for req in batch.reqs for page, _ in loop.wire.sent[req.bootstrap_room]}
    for req in batch.reqs:
        tokens, pages = tuple(req.get_fill_ids()), loop.pages_of(req)
        for place in range(req.prefix_len // PAGE, len(pages)):
            assert pages[place] not in reading - own, "handed out while it was read"
            loop.content[pages[place]] = tokens[: (place + 1) * PAGE]
    loop.before_layer()
    loop.allocator.get_kvcache().layer_stored(0)
    loop.after_layer()
    return GenerationBatchResult(next_token_ids=torch.zeros(len(batch.reqs), dtype=torch.int64))
