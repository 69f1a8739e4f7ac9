"""Hooks of prefill and decode servers: what passes between them, and which batch runs."""

from sglang_hma.seam_list.seam import Seam, ours

TRANSFER = (
    Seam(
        "sglang.srt.disaggregation.utils.get_kv_class",
        "hands out our Mooncake manager, sender, receiver and bootstrap server: format handshake "
        "in both directions, layer-wise sending, checksums, no CUDA event on CPU, registrations "
        "by the server's own processes only",
        ours("transfer.classes", "get_kv_class"),
        lambda config: config.role != "null",
        "prefill, decode",
    ),
    Seam(
        "sglang.srt.disaggregation.common.conn._get_bootstrap_session",
        "what SGLang itself asks of a prefill server proves that it knows the cluster secret, and "
        "so does the answer",
        ours("transfer.decode.sealed_session", "get_bootstrap_session"),
        lambda config: config.role == "decode" and config.cluster_secret_file is not None,
        "decode, `--hma-cluster-secret-file`",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._init_req_state",
        "checks a request's bootstrap fields before it is sent to the scheduler, which ends on a "
        "value that it cannot work with, asks any address that is named for pages, and with the "
        "fake host generates from pages that nobody filled",
        ours("transfer.request_fields", "init_req_state"),
        lambda config: config.role != "null",
        "prefill, decode",
    ),
    *(
        Seam(
            target,
            "a request that only one of the two refuses (too long for its pool, an adapter that it "
            "has not): the other is told at once, and does not wait until it counts as lost",
            ours("transfer.refusals", name),
            lambda config: config.role != "null",
            "prefill, decode",
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
            ours("transfer.short_prompts", method.removeprefix("_")),
            lambda config: config.offload_below > 0,
            "prefill, `--hma-offload-threshold`",
        )
        for method in ("_send_one_request", "_send_batch_request")
    ),
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.get_next_disagg_decode_batch_to_run",
        "short prompts, which a prefill server leaves to decode, run between its steps",
        ours("transfer.decode.local_prefill", "get_next_batch"),
        lambda config: config.packs_kv and config.role == "decode",
        "bfp8, decode",
    ),
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.run_batch",
        "before a prefill batch runs, its requests' pages are queued behind a gate that the pool "
        "completes layer by layer; the gate ends with the forward, whatever happens; between "
        "layers, requests whose pages have arrived are answered, since the router keeps a stream's "
        "first token back until prefill has answered (sgl-project/sglang#22853)",
        ours("transfer.prefill.run_batch", "run_batch"),
        lambda config: config.gates_forwards,
        "prefill, unless `--hma-layers-per-send all` without `--hma-trace`",
    ),
    Seam(
        "sglang.srt.disaggregation.utils.get_pd_kv_layout",
        "publishes the `KVFormat` descriptor in SGLang's own bootstrap handshake",
        ours("transfer.classes", "get_pd_kv_layout"),
        lambda config: config.role != "null",
        "prefill, decode",
    ),
    Seam(
        "sglang.srt.disaggregation.utils.MetadataBuffers.set_buf",
        "a prompt's logprobs travel to decode, which answers with all of them; SGLang leaves them "
        "in prefill's answer, and its router takes a part of them from there "
        "(ai-dynamo/dynamo#14453); more than 128 top logprobs would end prefill's scheduler",
        ours("transfer.prefill.prompt_logprobs", "set_buf"),
        lambda config: config.role == "prefill",
        "prefill",
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.output_streamer"
        "._GenerationStreamAccumulator.accept",
        "SGLang's decode servers leave the logprobs of a prompt out of their answers",
        ours("transfer.decode.prompt_answers", "accept"),
        lambda config: config.role == "decode",
        "decode",
    ),
    Seam(
        "sglang.srt.disaggregation.decode.DecodeTransferQueue._commit_transfer_to_req",
        "the logprobs of a request's prompt have arrived before it is decoded",
        ours("transfer.decode.prompt_answers", "commit_native"),
        lambda config: config.role == "decode" and not config.packs_kv,
        "native, decode",
    ),
    Seam(
        "sglang.srt.disaggregation.decode.prepare_abort",
        "what prefill has refused is answered with 400 and prefill's reason",
        ours("transfer.refusals", "prepare_abort"),
        lambda config: config.role == "decode",
        "decode",
    ),
    Seam(
        "sglang.srt.disaggregation.prefill.prepare_abort",
        "what decode has given up is answered with 400: decode's own answer counts, and the router "
        "prefers a 500 of prefill's",
        ours("transfer.refusals", "prepare_abort_on_prefill"),
        lambda config: config.role == "prefill",
        "prefill",
    ),
    Seam(
        "sglang.srt.disaggregation.decode.DecodePreallocQueue",
        "reserves pages by format; tells the peer the landing page instead of the part-full last "
        "page",
        ours("transfer.decode.queues", "HmaDecodePreallocQueue"),
        lambda config: config.packs_kv and config.role == "decode",
        "bfp8, decode",
    ),
    Seam(
        "sglang.srt.disaggregation.decode.DecodeTransferQueue",
        "unpacks the landed last page (exactly) when a transfer commits",
        ours("transfer.decode.queues", "HmaDecodeTransferQueue"),
        lambda config: config.packs_kv and config.role == "decode",
        "bfp8, decode",
    ),
    Seam(
        "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint",
        "decode's prefix cache keeps no pages but those that prefill sent",
        ours("transfer.decode.cached_prompts", "checkpoint"),
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
        ours("transfer.decode.retraction", "retract_decode"),
        lambda config: config.packs_kv and config.role == "decode",
        "bfp8, decode",
    ),
    Seam(
        "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.build_disagg_draft_input",
        "NGRAM and STANDALONE have no first drafts on a decode server: SGLang's relay fails on the "
        "first request",
        ours("speculation.handover", "build_disagg_draft_input"),
        lambda config: config.packs_kv and config.role == "decode",
        "bfp8, decode",
    ),
)
