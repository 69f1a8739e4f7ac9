"""Hooks of any server: pools, weights, processes, requests."""

from sglang_hma.seam_list.seam import Seam, ours

SERVING = (
    Seam(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator",
        "capacity from 8.5 bits an element, in whole slabs; SGLang would count the model dtype's "
        "bytes",
        ours("kvcache.sizing", "HmaPoolConfigurator"),
        lambda config: config.packs_kv and not config.on_card,
        "bfp8",
    ),
    Seam(
        "sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator",
        "the same for the two pools of a model that mixes layers with and without a window",
        ours("kvcache.sizing", "create_configurator"),
        lambda config: config.may_have_two_pools,
        "bfp8, on CPU",
    ),
    Seam(
        "sglang.srt.mem_cache.allocator.swa.SWATokenToKVPoolAllocator",
        "slots of both pools or of neither, and room counted by format in each; SGLang would count "
        "tokens, and fail where they are enough but no page of the right format is left",
        ours("kvcache.two_pools", "TwoPoolAllocator"),
        lambda config: config.may_have_two_pools and config.mixes_page_formats,
        "bfp8, decode or null, on CPU",
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.invariant_checker"
        ".SchedulerInvariantChecker._check_swa_pool",
        "the leak check of the window layers' pool, in pages as well",
        ours("kvcache.leak_check", "check_window_pool"),
        lambda config: config.may_have_two_pools and config.mixes_page_formats,
        "bfp8, decode or null, on CPU",
    ),
    Seam(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator",
        "capacity from the card's memory",
        ours("prefill.ttnn.pool", "CardPoolConfigurator"),
        lambda config: config.on_card,
        "ttnn",
    ),
    Seam(
        "sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info",
        "SGLang refuses what is longer than the pool, and admits only what leaves a page of it: "
        "what lies between waits for ever, with everybody behind it",
        ours("kvcache.budget", "get_worker_info"),
        lambda config: config.packs_kv and config.role != "decode",
        "bfp8, prefill or null",
    ),
    Seam(
        "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler._mha_host_inputs",
        "the hierarchical cache's copies of BFP8 pages are their bytes; SGLang's host pools hold "
        "rows",
        ours("kvcache.host_pool", "mha_host_inputs"),
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
        ours("kvcache.leak_check", "check_full_pool"),
        lambda config: config.mixes_page_formats or config.sends_early,
        "bfp8, decode or null; prefill, unless `--hma-layers-per-send all`",
    ),
    Seam(
        "sglang.srt.entrypoints.engine._set_envs_and_config",
        "a CPU server's processes are forked, so that SGLang is imported once",
        ours("processes", "set_envs_and_config"),
        lambda config: config.device == "cpu" and not config.on_card,
        "on CPU, without cards",
    ),
    Seam(
        "sglang.kernels.ops.activation.softcap._softcap_logits",
        "a Triton kernel that SGLang runs on a CPU too, for models that cap their last logits",
        ours("cpu_ops", "softcap_logits"),
        lambda config: config.device == "cpu" and not config.on_card,
        "on CPU, without cards",
    ),
    Seam(
        "sglang.kernels.ops.sampling.murmur_hash.murmur_hash32",
        "what sampling_seed is drawn with is a kernel of sgl_kernel's on a CPU",
        ours("cpu_ops", "murmur_hash32"),
        lambda config: config.device == "cpu" and not config.on_card,
        "on CPU, without cards",
    ),
    Seam(
        "sglang.kernels.ops.elementwise.elementwise._launch_fused_gate_sigmoid_mul",
        "a Triton kernel that SGLang runs on a CPU too, for the shared experts of Qwen2-MoE",
        ours("cpu_ops", "gate_sigmoid_mul"),
        lambda config: config.device == "cpu" and not config.on_card,
        "on CPU, without cards",
    ),
    *(
        Seam(
            f"sglang.srt.{place}",
            "a client's sampling_seed is used on servers of any flags, whatever its batch (SGLang "
            "ignores it without --enable-deterministic-inference, and draws by rank where a "
            "neighbour has top_k, top_p or min_p: sgl-project/sglang#15481)",
            ours("seeds", name),
            lambda _: True,
            "always",
        )
        for place, name in (
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
        ours("penalties", "orchestrate"),
        lambda _: True,
        "always",
    ),
    Seam(
        "sglang.srt.lora.lora_manager.LoRAManager.validate_new_adapter",
        "what SGLang leaves out of an adapter's config (rank-stabilized scaling, ranks by layer, "
        "biases ...) is refused when it is loaded, and over rounded weights what was not tried: "
        "experts, embeddings, the LM head",
        ours("adapters", "validate_new_adapter"),
        lambda _: True,
        "always",
    ),
    *(
        Seam(
            f"sglang.srt.lora.lora_manager.LoRAManager.{method}",
            "SGLang pins small tensors of adapters on the host, which fails without a driver",
            ours("adapters", method),
            lambda config: config.device == "cpu",
            "on CPU",
        )
        for method in ("init_state", "prepare_lora_batch")
    ),
    Seam(
        "sglang.srt.distributed.parallel_state.init_distributed_environment",
        "the rendezvous of a server's ranks (torch's TCPStore) would be open on every interface",
        ours("transfer.listeners", "init_distributed_environment"),
        lambda config: config.bind is not None,
        "`--host` or `--hma-bind` is one address",
    ),
    Seam(
        "sglang.srt.distributed.device_communicators.mooncake_transfer_engine"
        ".MooncakeTransferEngine.initialize",
        "Mooncake listens on every interface, whatever address it is given, for everybody",
        ours("transfer.listeners", "initialize"),
        lambda config: (
            config.role != "null"
            and (config.bind is not None or config.cluster_secret_file is not None)
        ),
        "prefill, decode; `--host` or `--hma-bind` is one address, or `--hma-cluster-secret-file`",
    ),
    Seam(
        "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
        "lists as long as a client's `n` are made before anything is checked; on a "
        "pair each sample is a request with a room of its own (sgl-project/sglang#30723)",
        ours("transfer.request_values", "normalize"),
        lambda _: True,
        "always",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        "a token id that is not in the vocabulary, or a number that no tensor takes, ends the "
        "scheduler: refused with HTTP 400",
        ours("transfer.request_values", "create_tokenized_object"),
        lambda _: True,
        "always",
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.profiler_manager.SchedulerProfilerManager"
        "._profile",
        "a profile that cannot be made (a tool that is missing, a folder that cannot be written) "
        "ends the scheduler",
        ours("profiling", "profile"),
        lambda _: True,
        "always",
    ),
    Seam(
        "sglang.srt.models.utils.enable_fused_set_kv_buffer",
        "some models (Qwen3-MoE, GPT-OSS and others) rotate K and store K and V in one CUDA "
        "kernel, as bfloat16 rows, if the pool's dtype is bfloat16: they would ruin BFP8 pages",
        ours("attention.fused_store", "enable_fused_set_kv_buffer"),
        lambda config: config.packs_kv and config.device == "cuda",
        "bfp8, on CUDA",
    ),
    Seam(
        "sglang.srt.speculative.eagle_utils.alloc_for_spec_decode",
        "pages for drafts are BF16, as all generated ones; SGLang would take them as a prompt's, "
        "and fill its table with a Triton kernel",
        ours("speculation.slots", "alloc_for_spec_decode"),
        lambda config: config.mixes_page_formats,
        "bfp8, decode or null",
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.internal_state"
        ".SchedulerInternalStateController.get_internal_state",
        "formats, kernels and cards under `internal_states[].hma` of `/get_server_info`",
        ours("server_info", "get_internal_state"),
        lambda config: True,
        "always",
    ),
)
