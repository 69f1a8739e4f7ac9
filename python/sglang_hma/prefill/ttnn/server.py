"""The runtime inside an SGLang prefill server: the model class that SGLang loads."""

import itertools
import logging
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.model_executor.forward_context import get_req_to_token_pool
from sglang.srt.runtime_context import get_model, get_schedule

from hma_kernels import PAGE
from sglang_hma.config import HmaConfig
from sglang_hma.prefill.ttnn.buckets import BLOCK, buckets, table_width
from sglang_hma.prefill.ttnn.card import Card, described_only, open_card
from sglang_hma.prefill.ttnn.checkpoint import check_files
from sglang_hma.prefill.ttnn.chunk import Chunk
from sglang_hma.prefill.ttnn.lane import memory_of
from sglang_hma.prefill.ttnn.model import PrefillModel, rotary_embedding
from sglang_hma.prefill.ttnn.runner import Runner
from sglang_hma.prefill.ttnn.shape import ModelShape
from sglang_hma.prefill.ttnn.weights import WeightCache, Weights, checkpoint_folder

logger = logging.getLogger(__name__)


class _CardHead:
    """The LM head that LogitsProcessor multiplies with; SGLang asks layers without a `weight` for
    a `quant_method`."""

    def __init__(self, model: PrefillModel) -> None:
        self.model = model
        self.quant_method = self

    def apply(self, _: Any, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.model.output.logits(hidden)


class CardCausalLM(torch.nn.Module):
    """What SGLang takes for the ARCHITECTURES of shape.py."""

    serving: "ClassVar[CardCausalLM]"  # a process has one model, loaded before its pool is made

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        if quant_config is not None:
            raise RuntimeError(
                "the checkpoint is quantized: serve it with --hma-prefill-runtime reference "
                "--hma-weight-format native"
            )
        self.config = config
        self.shape = ModelShape.of(config)
        self.start_layer, self.end_layer = 0, self.shape.layers
        ours = HmaConfig.require()
        self.card: Card = open_card(ours.device_ids, ours.chips)
        self.part = self.shape.split(ours.chips)
        self.logits_processor = LogitsProcessor(config)
        CardCausalLM.serving = self

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        formats, dram = HmaConfig.require().weight_formats, self.card.dram
        needed = self.part.weight_bytes(formats)
        if needed > dram.free:
            raise RuntimeError(
                f"the model's weights take {needed / 1e9:.1f} GB of a chip's "
                f"{dram.free / 1e9:.1f} GB: use a smaller model, --hma-weight-format bfp8, or "
                "share it between more chips with --hma-mesh"
            )
        # A checkpoint from a hub is on disk once its first tensor is here.
        tensors = iter(tensors)
        first = list(itertools.islice(tensors, 1))
        source, chips = get_model(), self.card.chips
        folder = checkpoint_folder(source.model_path, source.revision, source.download_dir)
        if folder:
            check_files(folder, self.shape)
        cache = WeightCache.for_model(folder, formats, chips) if folder else None
        weights = Weights(self.shape, self.card, cache, formats)
        if not weights.load_cached():
            weights.load(itertools.chain(first, tensors))
        rotary = rotary_embedding(self.config)
        context = self.config.context_len  # SGLang notes it there
        self.model = PrefillModel(self.card, self.shape, weights, rotary, context=context)
        self.head = _CardHead(self.model)
        logger.info(
            "Tenstorrent %s, %d chips: weights take %.2f of %.2f GB of each",
            self.card.arch,
            chips,
            (dram.free - self.card.dram.free) / 1e9,
            dram.total / 1e9,
        )

    @property
    def chunk_tokens(self) -> int:
        """New tokens of a batch at most; without chunks a prompt is as long as the context."""
        said = get_schedule().chunked_prefill_size
        return int(said) if said > 0 else self.model.context

    def fitting_tokens(self, wanted: int) -> int:
        """At most `wanted` KV tokens beside what a forward takes and page 0; RuntimeError if not
        even one chunk fits."""
        dram, chunk = self.card.dram, self.chunk_tokens
        free = dram.free
        among = buckets(chunk)
        width = table_width(self.model.context, among)
        lanes = memory_of(among, self.part, width, dram.total)
        room = (self.part.pages_in(free - lanes, min(chunk, BLOCK)) - 1) * PAGE
        if room < chunk:
            raise RuntimeError(
                f"{free / 1e9:.2f} GB of the card are left for K and V of a chunk of {chunk} "
                "tokens: use a smaller model or a smaller --chunked-prefill-size"
            )
        if wanted > room:
            logger.warning("KV capacity is %d tokens, not %d: the card is full", room, wanted)
        return min(wanted, room)

    def facts(self, config: HmaConfig) -> dict[str, Any]:
        """For /get_server_info; memory in bytes, of each chip."""
        dram = self.card.dram
        return {
            "arch": self.card.arch,
            "device_ids": list(config.device_ids),
            "chips": self.card.chips,
            "dram_total": dram.total,
            "dram_free": dram.free,
            "weights": self.part.weight_bytes(config.weight_formats),
            **self.runner.facts(),
        }

    def serve_from(self, pool: Any) -> None:
        """pool: a CardKVPool. Everything that a batch may need is made before the first comes."""
        self.runner = Runner(
            self.model,
            pool.card_cache,
            pool.store_pages,
            pool.layer_stored,
            chunk_tokens=self.chunk_tokens,
        )
        self.runner.warm_up(traces=not described_only())

    @torch.no_grad()
    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch: Any, **_: Any
    ) -> LogitsProcessorOutput:
        chunks = chunks_of(input_ids, batch, get_req_to_token_pool().req_to_token)
        if only_next_tokens(batch):
            return LogitsProcessorOutput(next_token_logits=self.runner.last_logits(chunks).float())
        hidden = torch.cat(self.runner.hidden(chunks))
        return self.logits_processor(input_ids, hidden, self.head, batch)


def only_next_tokens(batch: Any) -> bool:
    """Whether nothing but the logits of each request's last token is asked for."""
    return not (
        batch.return_logprob
        or batch.capture_hidden_mode.need_capture()
        or batch.multi_item_delimiter_indices is not None
        or batch.token_indices_to_pool is not None
    )


def chunks_of(input_ids: torch.Tensor, batch: Any, req_to_token: torch.Tensor) -> list[Chunk]:
    """One of each request of an extend batch."""
    if not batch.forward_mode.is_extend():
        raise RuntimeError(f"a Tenstorrent server only prefills, not {batch.forward_mode}")
    chunks, begin = [], 0
    for index in range(batch.batch_size):
        length, start = batch.extend_seq_lens_cpu[index], int(batch.extend_prefix_lens_cpu[index])
        slots = req_to_token[int(batch.req_pool_indices[index]), : start + length : PAGE]
        tokens = input_ids[begin : begin + length].numpy()
        chunks.append(Chunk(tokens, start, (slots // PAGE).numpy()))
        begin += length
    return chunks
