"""Every hook of sglang-hma into SGLang, with its reason.

docs/sglang-seams.md is generated from this list (scripts/seams_doc.py); seams.py applies it.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_hma.config import HmaConfig


@dataclass(frozen=True)
class Seam:
    """One hooked SGLang object. `load` returns the class that replaces it, or the
    function that wraps it and gets the original as its first argument."""

    target: str
    reason: str
    load: Callable[[], Any]
    applies: Callable[[HmaConfig], bool]
    when: str  # what `applies` says


@dataclass(frozen=True)
class PluginPoint:
    """Something that SGLang offers to plugins, and what it is given."""

    point: str
    ours: str
    reason: str


PLUGIN_POINTS = (
    PluginPoint(
        "entry point `sglang.srt.platforms`: `hma`",
        "`sglang_hma:activate`",
        "selects the platform class by device",
    ),
    PluginPoint(
        "entry point `sglang.srt.plugins`: `hma`",
        "`sglang_hma:register`",
        "runs in every process before anything is built",
    ),
    PluginPoint(
        "`SRTPlatform` (CPU: out-of-tree; CUDA: subclass of `CudaSRTPlatform`, or out-of-tree "
        "where sgl_kernel is missing)",
        "`platforms/`",
        "the in-tree platforms need sgl_kernel",
    ),
    PluginPoint(
        "`register_attention_backend`, `add_attention_backend_choices`: `hma`",
        "`attention/backend.py`",
        "attention over both page formats",
    ),
    PluginPoint(
        "`register_resolution_hook`: `handle_model_specific_adjustments`",
        "`attention/listed.py`",
        "gpt-oss and EXAONE 4 are started only with an attention backend of a list; ours computes "
        "windows and sinks as well",
    ),
    PluginPoint(
        "`SGLANG_EXTERNAL_MODEL_PACKAGE`",
        "`served_model/`",
        "SGLang's own class of the served model, so that SGLang need not import all of its models",
    ),
    PluginPoint(
        "`sglang.srt.models.registry.ModelRegistry.models`",
        "`prefill/ttnn/server.py:CardCausalLM` for the `ARCHITECTURES` of `shape.py`",
        "with `--hma-prefill-runtime ttnn`: the model runs on a Tenstorrent card",
    ),
)


def _from(module: str, name: str) -> Callable[[], Any]:
    return lambda: pkgutil.resolve_name(f"sglang_hma.{module}:{name}")


SEAMS = (
    Seam(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator",
        "capacity from 8.5 bits an element, in whole slabs; SGLang would count the model dtype's "
        "bytes",
        _from("kvcache.sizing", "HmaPoolConfigurator"),
        lambda config: config.packs_kv and not config.on_card,
        "bfp8",
    ),
    Seam(
        "sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator",
        "the same for the two pools of a model that mixes layers with and without a window",
        _from("kvcache.sizing", "create_configurator"),
        lambda config: config.may_have_two_pools,
        "bfp8, null, on CPU",
    ),
    Seam(
        "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator",
        "slots of both pools or of neither, and room counted by format in each; SGLang would count "
        "tokens, and fail where they are enough but no page of the right format is left",
        _from("kvcache.two_pools", "TwoPoolAllocator"),
        lambda config: config.may_have_two_pools,
        "bfp8, null, on CPU",
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.invariant_checker"
        ".SchedulerInvariantChecker._check_swa_pool",
        "the leak check of the window layers' pool, in pages as well",
        _from("kvcache.leak_check", "check_window_pool"),
        lambda config: config.may_have_two_pools,
        "bfp8, null, on CPU",
    ),
    Seam(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator",
        "capacity from the card's memory",
        _from("prefill.ttnn.pool", "CardPoolConfigurator"),
        lambda config: config.on_card,
        "ttnn",
    ),
    Seam(
        "sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info",
        "SGLang refuses what is longer than the pool, and admits only what leaves a page of it: "
        "what lies between waits for ever, with everybody behind it",
        _from("kvcache.budget", "get_worker_info"),
        lambda config: config.packs_kv and config.role != "decode",
        "bfp8, prefill or null",
    ),
    Seam(
        "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler._mha_host_inputs",
        "the hierarchical cache's copies of BFP8 pages are their bytes; SGLang's host pools hold "
        "rows",
        _from("kvcache.host_pool", "mha_host_inputs"),
        lambda config: config.packs_kv and config.role == "prefill" and not config.on_card,
        "bfp8, prefill, without cards",
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.invariant_checker"
        ".SchedulerInvariantChecker._check_full_pool",
        "on prefill, pages that are freed and still on their way belong to nobody; elsewhere "
        "SGLang's leak check adds tokens up to a constant, but a page's share of the memory "
        "depends on its format, so pages are counted instead (as strictly: one page too many or "
        "too few is a leak)",
        _from("kvcache.leak_check", "check_full_pool"),
        lambda config: config.mixes_page_formats or config.sends_early,
        "bfp8, decode or null; prefill, unless `--hma-layers-per-send all`",
    ),
    Seam(
        "sglang.srt.entrypoints.engine._set_envs_and_config",
        "a CPU server's processes are forked, so that SGLang is imported once",
        _from("processes", "set_envs_and_config"),
        lambda config: config.device == "cpu" and not config.on_card,
        "on CPU, without cards",
    ),
    Seam(
        "sglang.kernels.ops.activation.softcap._softcap_logits",
        "a Triton kernel that SGLang runs on a CPU too, for models that cap their last logits",
        _from("cpu_ops", "softcap_logits"),
        lambda config: config.device == "cpu" and not config.on_card,
        "on CPU, without cards",
    ),
    Seam(
        "sglang.kernels.ops.sampling.murmur_hash.murmur_hash32",
        "what sampling_seed is drawn with is a kernel of sgl_kernel's on a CPU",
        _from("cpu_ops", "murmur_hash32"),
        lambda config: config.device == "cpu" and not config.on_card,
        "on CPU, without cards",
    ),
    Seam(
        "sglang.kernels.ops.elementwise.elementwise._launch_fused_gate_sigmoid_mul",
        "a Triton kernel that SGLang runs on a CPU too, for the shared experts of Qwen2-MoE",
        _from("cpu_ops", "gate_sigmoid_mul"),
        lambda config: config.device == "cpu" and not config.on_card,
        "on CPU, without cards",
    ),
    *(
        Seam(
            f"sglang.srt.{place}",
            "a client's sampling_seed is used on servers of any flags, whatever its batch (SGLang "
            "ignores it without --enable-deterministic-inference, and draws by rank where a "
            "neighbour has top_k, top_p or min_p: sgl-project/sglang#15481)",
            _from("seeds", ours),
            lambda _: True,
            "always",
        )
        for place, ours in (
            (
                "sampling.sampling_batch_info.SamplingBatchInfo.adjusted_from_schedule_batch",
                "from_batch",
            ),
            ("sampling.sampling_batch_info.SamplingBatchInfo.merge_batch", "merge_batch"),
            ("layers.sampler.Sampler._sample_from_probs", "sample"),
        )
    ),
    Seam(
        "sglang.srt.sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator.__init__",
        "SGLang applies a request's penalties in the order of a set of classes where scheduling "
        "does not overlap: two processes would answer otherwise",
        _from("penalties", "orchestrate"),
        lambda _: True,
        "always",
    ),
    Seam(
        "sglang.srt.lora.lora_manager.LoRAManager.validate_new_adapter",
        "what SGLang leaves out of an adapter's config (rank-stabilized scaling, ranks by layer, "
        "biases ...) is refused when it is loaded, and over rounded weights what was not tried: "
        "experts, embeddings, the LM head",
        _from("adapters", "validate_new_adapter"),
        lambda _: True,
        "always",
    ),
    *(
        Seam(
            f"sglang.srt.lora.lora_manager.LoRAManager.{method}",
            "SGLang pins small tensors of adapters on the host, which fails without a driver",
            _from("adapters", method),
            lambda config: config.device == "cpu",
            "on CPU",
        )
        for method in ("init_state", "prepare_lora_batch")
    ),
    Seam(
        "sglang.srt.distributed.parallel_state.init_distributed_environment",
        "the rendezvous of a server's ranks (torch's TCPStore) would be open on every interface",
        _from("transfer.listeners", "init_distributed_environment"),
        lambda config: config.bind is not None,
        "`--host` or `--hma-bind` is one address",
    ),
    Seam(
        "sglang.srt.distributed.device_communicators.mooncake_transfer_engine"
        ".MooncakeTransferEngine.initialize",
        "Mooncake listens on every interface, whatever address it is given, for everybody",
        _from("transfer.listeners", "initialize"),
        lambda config: (
            config.role != "null"
            and (config.bind is not None or config.cluster_secret_file is not None)
        ),
        "prefill, decode; `--host` or `--hma-bind` is one address, or `--hma-cluster-secret-file`",
    ),
    Seam(
        "sglang.srt.disaggregation.utils.get_kv_class",
        "hands out our Mooncake manager, sender, receiver and bootstrap server: format handshake "
        "in both directions, layer-wise sending, checksums, no CUDA event on CPU, registrations "
        "by the server's own processes only",
        _from("transfer.classes", "get_kv_class"),
        lambda config: config.role != "null",
        "prefill, decode",
    ),
    Seam(
        "sglang.srt.disaggregation.common.conn._get_bootstrap_session",
        "what SGLang itself asks of a prefill server proves that it knows the cluster secret, and "
        "so does the answer",
        _from("transfer.decode.sealed_session", "get_bootstrap_session"),
        lambda config: config.role == "decode" and config.cluster_secret_file is not None,
        "decode, `--hma-cluster-secret-file`",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._init_req_state",
        "checks a request's bootstrap fields before it is sent to the scheduler, which ends on a "
        "value that it cannot work with, asks any address that is named for pages, and with the "
        "fake host generates from pages that nobody filled",
        _from("transfer.request_fields", "init_req_state"),
        lambda config: config.role != "null",
        "prefill, decode",
    ),
    *(
        Seam(
            target,
            "a request that only prefill refuses (too long for its pool, an adapter that it has "
            "not): decode is told why at once, and does not wait until it counts as lost",
            _from("transfer.refusals", name),
            lambda config: config.role == "prefill",
            "prefill",
        )
        for target, name in (
            (
                "sglang.srt.managers.tokenizer_manager.TokenizerManager"
                "._release_req_states_on_failure",
                "release_states",
            ),
            ("sglang.srt.managers.scheduler.Scheduler.abort_request", "abort_request"),
            (
                "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
                "add_request_to_queue",
            ),
        )
    ),
    *(
        Seam(
            f"sglang.srt.managers.tokenizer_manager.TokenizerManager.{method}",
            "answers at once, without a token, the half of a request whose short prompt decode "
            "computes",
            _from("transfer.short_prompts", method.removeprefix("_")),
            lambda config: config.offload_below > 0,
            "prefill, `--hma-offload-threshold`",
        )
        for method in ("_send_one_request", "_send_batch_request")
    ),
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.get_next_disagg_decode_batch_to_run",
        "short prompts, which a prefill server leaves to decode, run between its steps",
        _from("transfer.decode.local_prefill", "get_next_batch"),
        lambda config: config.packs_kv and config.role == "decode",
        "bfp8, decode",
    ),
    Seam(
        "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
        "lists as long as a client's `n` are made before anything is checked; on a "
        "pair each sample is a request with a room of its own (sgl-project/sglang#30723)",
        _from("transfer.request_values", "normalize"),
        lambda _: True,
        "always",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        "a token id that is not in the vocabulary, or a number that no tensor takes, ends the "
        "scheduler: refused with HTTP 400",
        _from("transfer.request_values", "create_tokenized_object"),
        lambda _: True,
        "always",
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.profiler_manager.SchedulerProfilerManager"
        "._profile",
        "a profile that cannot be made (a tool that is missing, a folder that cannot be written) "
        "ends the scheduler",
        _from("profiling", "profile"),
        lambda _: True,
        "always",
    ),
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.run_batch",
        "before a prefill batch runs, its requests' pages are queued behind a gate that the pool "
        "completes layer by layer; the gate ends with the forward, whatever happens; between "
        "layers, requests whose pages have arrived are answered, since the router keeps a stream's "
        "first token back until prefill has answered (sgl-project/sglang#22853)",
        _from("transfer.prefill.run_batch", "run_batch"),
        lambda config: config.gates_forwards,
        "prefill, unless `--hma-layers-per-send all` without `--hma-trace`",
    ),
    Seam(
        "sglang.srt.models.utils.enable_fused_set_kv_buffer",
        "some models (Qwen3-MoE, GPT-OSS and others) rotate K and store K and V in one CUDA "
        "kernel, as bfloat16 rows, if the pool's dtype is bfloat16: they would ruin BFP8 pages",
        _from("attention.fused_store", "enable_fused_set_kv_buffer"),
        lambda config: config.packs_kv and config.device == "cuda",
        "bfp8, on CUDA",
    ),
    Seam(
        "sglang.srt.disaggregation.utils.get_pd_kv_layout",
        "publishes the `KVFormat` descriptor in SGLang's own bootstrap handshake",
        _from("transfer.classes", "get_pd_kv_layout"),
        lambda config: config.role != "null",
        "prefill, decode",
    ),
    Seam(
        "sglang.srt.disaggregation.utils.MetadataBuffers.set_buf",
        "a prompt's logprobs travel to decode, which answers with all of them; SGLang leaves them "
        "in prefill's answer, and its router takes a part of them from there "
        "(ai-dynamo/dynamo#14453); more than 128 top logprobs would end prefill's scheduler",
        _from("transfer.prefill.prompt_logprobs", "set_buf"),
        lambda config: config.role == "prefill",
        "prefill",
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.output_streamer"
        "._GenerationStreamAccumulator.accept",
        "SGLang's decode servers leave the logprobs of a prompt out of their answers",
        _from("transfer.decode.prompt_answers", "accept"),
        lambda config: config.role == "decode",
        "decode",
    ),
    Seam(
        "sglang.srt.disaggregation.decode.DecodeTransferQueue._commit_transfer_to_req",
        "the logprobs of a request's prompt have arrived before it is decoded",
        _from("transfer.decode.prompt_answers", "commit_native"),
        lambda config: config.role == "decode" and not config.packs_kv,
        "native, decode",
    ),
    Seam(
        "sglang.srt.disaggregation.decode.prepare_abort",
        "what prefill has refused is answered with 400 and prefill's reason",
        _from("transfer.refusals", "prepare_abort"),
        lambda config: config.role == "decode",
        "decode",
    ),
    Seam(
        "sglang.srt.disaggregation.decode.DecodePreallocQueue",
        "reserves pages by format; tells the peer the landing page instead of the part-full last "
        "page",
        _from("transfer.decode.queues", "HmaDecodePreallocQueue"),
        lambda config: config.packs_kv and config.role == "decode",
        "bfp8, decode",
    ),
    Seam(
        "sglang.srt.disaggregation.decode.DecodeTransferQueue",
        "unpacks the landed last page (exactly) when a transfer commits",
        _from("transfer.decode.queues", "HmaDecodeTransferQueue"),
        lambda config: config.packs_kv and config.role == "decode",
        "bfp8, decode",
    ),
    Seam(
        "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint",
        "decode's prefix cache keeps no pages but those that prefill sent",
        _from("transfer.decode.cached_prompts", "checkpoint"),
        lambda config: (
            config.packs_kv and config.role == "decode" and config.decode_cache == "prompt"
        ),
        "bfp8, decode, `--hma-decode-cache prompt`",
    ),
    Seam(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode",
        "in a full pool the last running request is put aside too; SGLang would abort it, though "
        "requests that are landing hold pages that they will give back; one whose prompt was "
        "computed here is not put aside before it has its first token",
        _from("transfer.decode.retraction", "retract_decode"),
        lambda config: config.packs_kv and config.role == "decode",
        "bfp8, decode",
    ),
    Seam(
        "sglang.srt.speculative.eagle_utils.alloc_for_spec_decode",
        "pages for drafts are BF16, as all generated ones; SGLang would take them as a prompt's, "
        "and fill its table with a Triton kernel",
        _from("speculation.slots", "alloc_for_spec_decode"),
        lambda config: config.mixes_page_formats,
        "bfp8, decode or null",
    ),
    Seam(
        "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.build_disagg_draft_input",
        "NGRAM and STANDALONE have no first drafts on a decode server: SGLang's relay fails on the "
        "first request",
        _from("speculation.handover", "build_disagg_draft_input"),
        lambda config: config.packs_kv and config.role == "decode",
        "bfp8, decode",
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.internal_state"
        ".SchedulerInternalStateController.get_internal_state",
        "formats, kernels and cards under `internal_states[].hma` of `/get_server_info`",
        _from("server_info", "get_internal_state"),
        lambda config: True,
        "always",
    ),
)
