"""The runtime inside an SGLang prefill server: the model class that SGLang loads."""

import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.model_executor.forward_context import get_req_to_token_pool, get_token_to_kv_pool
from sglang.srt.runtime_context import get_model

from hma_kernels import PAGE
from sglang_hma.config import HmaConfig
from sglang_hma.prefill.ttnn.card import Card, open_card
from sglang_hma.prefill.ttnn.checkpoint import check_files
from sglang_hma.prefill.ttnn.model import (
    LARGEST_ATTENTION_CHUNK,
    Chunk,
    PrefillModel,
    rotary_embedding,
)
from sglang_hma.prefill.ttnn.readback import Readback
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
        return self.model.logits(hidden)


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
        self.readback: Readback | None = None
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
        self.model = PrefillModel(self.card, self.shape, weights, rotary_embedding(self.config))
        self.head = _CardHead(self.model)
        logger.info(
            "Tenstorrent %s, %d chips: weights take %.2f of %.2f GB of each",
            self.card.arch,
            chips,
            (dram.free - self.card.dram.free) / 1e9,
            dram.total / 1e9,
        )

    def fitting_tokens(self, wanted: int, chunk: int) -> int:
        """At most `wanted` KV tokens beside a forward of `chunk` tokens and page 0; RuntimeError
        if not even one chunk fits."""
        free = self.card.dram.free
        room = (self.part.pages_in(free, chunk) - 1) * PAGE
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
            "programs": self.card.programs,
        }

    @torch.no_grad()
    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch: Any, **_: Any
    ) -> LogitsProcessorOutput:
        pool = get_token_to_kv_pool()
        if self.readback is None:
            self.readback = Readback(self.card, pool.store_pages, pool.layer_stored)
        parts = parts_of(input_ids, batch, get_req_to_token_pool().req_to_token)
        chunks = [part.chunk for part in parts]
        own = [chunk.own_pages for chunk in chunks]
        readback = self.readback

        def stored(layer: int, pairs: list[tuple[Any, Any]]) -> None:
            readback.submit(layer, list(zip(own, pairs, strict=True)))

        try:
            streams = self.model.forward(chunks, pool.card_cache, stored)
            hidden = input_ids.new_zeros(len(input_ids), self.shape.hidden, dtype=torch.bfloat16)
            end = 0
            for part, stream in zip(parts, streams, strict=True):
                length, rows = len(part.chunk.tokens), part.rows
                end += length
                if rows:
                    hidden[end - rows : end] = self.model.hidden(stream, length - rows, rows)
        finally:
            readback.drain()
        return self.logits_processor(input_ids, hidden, self.head, batch)


@dataclass(frozen=True)
class Part:
    """A chunk, and how many of its last tokens' hidden states are asked for."""

    chunk: Chunk
    rows: int


def parts_of(input_ids: torch.Tensor, batch: Any, req_to_token: torch.Tensor) -> list[Part]:
    """Of each request of an extend batch one, or two where its cached prefix ends where attention
    could go over few tokens at once: then all but the first of them stand apart."""
    if not batch.forward_mode.is_extend():
        raise RuntimeError(f"a Tenstorrent server only prefills, not {batch.forward_mode}")
    parts, begin = [], 0
    for index in range(batch.batch_size):
        length, start = batch.extend_seq_lens_cpu[index], batch.extend_prefix_lens_cpu[index]
        tokens = input_ids[begin : begin + length].numpy()
        slots = req_to_token[int(batch.req_pool_indices[index]), : start + length : PAGE]
        pages = (slots // PAGE).numpy()
        cut = min(-start % LARGEST_ATTENTION_CHUNK, length)
        for first, last in ((0, cut), (cut, length)):
            if first < last:
                rows = last - first if batch.return_logprob else int(last == length)
                parts.append(Part(Chunk(tokens[first:last], int(start) + first, pages), rows))
        begin += length
    return parts
