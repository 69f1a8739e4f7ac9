"""The Tenstorrent server's own forward, on a recorder: loaded and called as SGLang does it.

SGLang's part is small here: pools that are looked up, and a batch. No server is started and no
checkpoint is read: weights have shapes and no values.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
import torch
import tqdm  # type: ignore[import-untyped]

from benchmark.tenstorrent.module import recording
from benchmark.tenstorrent.recorder import Call, Recorder
from hma_kernels.layout import PAGE
from sglang_hma.config import CONFIG_ENV, HmaConfig
from sglang_hma.planner.model_shape import KNOWN
from sglang_hma.planner.model_shape import ModelShape as Dims
from sglang_hma.prefill.ttnn.config_fields import check_fields

CHUNK = 8192  # --chunked-prefill-size
PAGES = 8192  # of the pool; how many makes no difference to a call
MODELS = ("Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B")
ENVIRONMENT = {
    "TT_METAL_SIMULATOR": "a recorder",  # no card is looked for
    "TT_METAL_LOGS_PATH": os.devnull,
}


@dataclass(frozen=True)
class Bucket:
    """A batch: `requests` prompts of `tokens` new tokens each, behind `prefix` cached ones."""

    tokens: int
    requests: int = 1
    prefix: int = 0

    def __str__(self) -> str:
        behind = f" behind {self.prefix:,}" if self.prefix else ""
        many = f"{self.requests} x " if self.requests > 1 else ""
        return f"{many}{self.tokens:,}{behind}"


@dataclass(frozen=True)
class Recording:
    """Of one batch. new_programs: that the first batch of its kind needed after the server's start;
    calls: of a later one, when everything is compiled and captured."""

    bucket: Bucket
    new_programs: int
    calls: list[Call]


def config_of(model: str) -> Any:
    """A transformers config: of one of MODELS, or from a config.json or its folder.

    Raises UnsupportedModel for a field that the runtime does not know.
    """
    from transformers import AutoConfig, Qwen3Config

    if model in KNOWN:
        dims: Dims = KNOWN[model]
        return Qwen3Config(
            num_hidden_layers=dims.layers,
            hidden_size=dims.hidden,
            intermediate_size=dims.intermediate,
            num_attention_heads=dims.heads,
            num_key_value_heads=dims.kv_heads,
            head_dim=dims.head_dim,
            vocab_size=dims.vocab,
            tie_word_embeddings=dims.tied,
            max_position_embeddings=40960,
            architectures=["Qwen3ForCausalLM"],
        )
    path = Path(model)
    if not path.exists():
        raise SystemExit(f"--model {model}: none of {', '.join(MODELS)} and no config.json")
    config = AutoConfig.from_pretrained(path)
    check_fields(config)
    return config


class Server:
    """A model that is loaded on `chips` chips."""

    def __init__(self, recorder: Recorder, config: Any, pools: SimpleNamespace) -> None:
        from sglang_hma.prefill.ttnn.model import empty_cache
        from sglang_hma.prefill.ttnn.pieces import source_shapes
        from sglang_hma.prefill.ttnn.server import CardCausalLM

        self.recorder, self.pools = recorder, pools
        config.context_len = config.max_position_embeddings  # as SGLang notes it
        self.model = CardCausalLM(config)
        self.model.load_weights(
            (name, torch.empty(size, device="meta"))
            for name, size in source_shapes(self.model.shape).items()
        )
        pools.kv.card_cache = empty_cache(self.model.card, self.model.shape, PAGES)
        self.model.serve_from(pools.kv)
        self.at_start = frozenset(recorder.programs)

    def record(self, bucket: Bucket) -> Recording:
        self.recorder.programs = set(self.at_start)
        self._forward(bucket)
        compiled = len(self.recorder.programs - self.at_start)
        self.recorder.take()
        self._forward(bucket)
        return Recording(bucket, compiled, self.recorder.take())

    def _forward(self, bucket: Bucket) -> None:
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode

        tokens, requests, prefix = bucket.tokens, bucket.requests, bucket.prefix
        pages = -(-(prefix + tokens) // PAGE)
        slots = torch.arange(PAGE, (1 + requests * pages) * PAGE).view(requests, -1)
        self.pools.requests = SimpleNamespace(req_to_token=slots)
        batch = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            batch_size=requests,
            return_logprob=False,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            multi_item_delimiter_indices=None,
            token_indices_to_pool=None,
            extend_seq_lens_cpu=[tokens] * requests,
            extend_prefix_lens_cpu=[prefix] * requests,
            req_pool_indices=torch.arange(requests),
        )
        ids = torch.zeros(requests * tokens, dtype=torch.int64)
        positions = torch.arange(prefix, prefix + tokens).repeat(requests)
        self.model.forward(ids, positions, batch)

    def close(self) -> None:
        self.model.runner.close()


@contextlib.contextmanager
def served(config: Any, chips: int = 1) -> Iterator[Server]:
    """A server that has started."""
    from sglang_hma.prefill.ttnn import server as seam

    kv = SimpleNamespace(card_cache=(), store_pages=_nothing, layer_stored=_nothing)
    pools = SimpleNamespace(kv=kv, requests=None)
    ours = HmaConfig(
        role="prefill", prefill_runtime="ttnn", chips=chips, device_ids=tuple(range(chips))
    )
    said = {CONFIG_ENV: msgspec.json.encode(ours).decode()}
    nowhere = SimpleNamespace(model_path="shapes alone: no files", revision=None, download_dir=None)
    sglang: dict[str, Any] = {
        "LogitsProcessor": _nothing,
        "get_model": lambda: nowhere,
        "get_schedule": lambda: SimpleNamespace(chunked_prefill_size=CHUNK),
        "get_req_to_token_pool": lambda: pools.requests,
    }
    with (
        mock.patch.dict(os.environ, ENVIRONMENT | said),
        mock.patch.multiple(seam, **sglang),
        mock.patch.object(tqdm, "tqdm", partial(tqdm.tqdm, disable=True)),
        recording() as recorder,
        torch.no_grad(),
    ):
        started = Server(recorder, config, pools)
        try:
            yield started
        finally:
            started.close()


def _nothing(*_: Any) -> None:
    """Pages arrive nowhere."""


def record(config: Any, buckets: Sequence[Bucket], chips: int = 1) -> list[Recording]:
    with served(config, chips) as server:
        return [server.record(bucket) for bucket in buckets]
