"""Small random models and what transformers makes of them in float32."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hma_kernels import PAGE, bfp8_unpack, reference
from sglang_hma.prefill.ttnn.card import Card
from sglang_hma.prefill.ttnn.chunk import Chunk, pages_of
from sglang_hma.prefill.ttnn.offline import OfflinePrefill, as_saved, split

NO_PAD = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
ORIGINAL = "original_max_position_embeddings"
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, ORIGINAL: 256},
    **{"short_factor": [1 + 0.1 * i for i in range(32)], "long_factor": [8.0] * 32},
}
ALL_CHOSEN = {"num_experts_per_tok": 32}
# Columns of all experts are more than lie side by side.
SOME_DENSE = {"mlp_only_layers": [1], "moe_intermediate_size": 416}
MOE = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64}

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3, biases": (Qwen3Config, Qwen3ForCausalLM, {"attention_bias": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    # As a published Qwen2.5 has them.
    "qwen2.5": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 2}
        | {"rope_theta": 1e6, "rms_norm_eps": 1e-6},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral, a wide window": (MistralConfig, MistralForCausalLM, {"sliding_window": 512}),
    "phi3": (Phi3Config, Phi3ForCausalLM, NO_PAD),
    "phi3, longrope": (
        Phi3Config,
        Phi3ForCausalLM,
        NO_PAD | {"rope_parameters": LONGROPE, ORIGINAL: 256},
    ),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, MOE | {"norm_topk_prob": True}),
    "qwen3_moe, all chosen": (Qwen3MoeConfig, Qwen3MoeForCausalLM, MOE | ALL_CHOSEN),
    "qwen3_moe, some dense": (Qwen3MoeConfig, Qwen3MoeForCausalLM, MOE | SOME_DENSE),
}


def random_model(
    kind: str,
    *,
    layers: int = 2,
    head_dim: int = 64,
    tied: bool = False,
    kv_heads: int = 2,
    vocab: int = 512,
    hidden: int = 256,
    spread: bool = True,
    context: int = 512,
) -> Any:
    """Weights that BF16 holds, as float32: as transformers initializes them, or spread.

    Spread: norms away from 1, biases away from 0, all others three times as large. No weight is
    without effect then, and a layer adds more than it was given, so that errors are not diluted.
    """
    make_config, make_model, fields = KINDS[kind]
    sizes = {"hidden_size": hidden, "intermediate_size": 512, "vocab_size": vocab}
    if kind.startswith(("qwen2", "phi3")):
        sizes["hidden_size"] = 4 * head_dim
    config = make_config(
        **sizes,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        initializer_range=0.06 if spread else 0.02,
        architectures=[make_model.__name__],
        **fields,
    )
    if "longrope" in kind:
        config.context_len = 256  # SGLang's note of --context-length
    model = make_model(config).eval()
    for name, parameter in model.named_parameters():
        if spread and "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif spread and name.endswith("bias"):
            parameter.data.normal_(0, 0.2)
        # Not its buffers: rotary frequencies in BF16 would be another model's.
        parameter.data = parameter.data.bfloat16().float()
    return model


# Of two experts' router logits, in deviations: what the format's rounding moves them by.
NEARLY_TIED = 0.05


@dataclass
class Result:
    """logits [n, vocab]; K and V of each layer [kv_heads, n, head_dim]; `tied` [n]: whether some
    layer chooses between experts that are NEARLY_TIED."""

    logits: torch.Tensor
    kv: list[tuple[torch.Tensor, torch.Tensor]]
    tied: torch.Tensor


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's, over all elements."""
    return float(np.corrcoef(a.double().flatten().numpy(), b.double().flatten().numpy())[0, 1])


def with_packed_weights(model: Any) -> Any:
    """Its linear weights through the numpy definition of the host packer, as W.T."""
    rounded = copy.deepcopy(model)
    rounded.lm_head.weight = torch.nn.Parameter(rounded.lm_head.weight.detach().clone())
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = _packed(module.weight)
        elif isinstance(module, Qwen3MoeExperts):
            for weights in (module.gate_up_proj, module.down_proj):
                weights.data = torch.stack([_packed(weight) for weight in weights])
    return rounded


def _packed(weight: torch.Tensor) -> torch.Tensor:
    """[out, in]"""
    packed = reference.pack(weight.detach().T.numpy(), "host")
    rows, columns = weight.T.shape
    unpacked = np.asarray(reference.unpack(packed), np.float32)[:rows, :columns]
    return torch.from_numpy(unpacked.T.copy())


def by_transformers(model: Any, tokens: np.ndarray) -> Result:
    chosen = getattr(model.config, "num_experts_per_tok", 0)
    options = {"output_router_logits": True} if chosen else {}
    with torch.no_grad():
        out = model(torch.from_numpy(tokens)[None].long(), use_cache=True, **options)
    layers = out.past_key_values.layers
    kv = [(layer.keys[0], layer.values[0]) for layer in layers]
    return Result(out.logits[0], kv, tied(out.get("router_logits") or (), chosen, len(tokens)))


def tied(layers: Sequence[torch.Tensor], chosen: int, positions: int) -> torch.Tensor:
    """[positions], of router logits [positions, experts]: whether the last of the `chosen` experts
    leads the next one by less than NEARLY_TIED in some layer."""
    found = torch.zeros(positions, dtype=torch.bool)
    for logits in layers:
        best = logits.topk(min(chosen + 1, logits.shape[-1])).values
        if best.shape[-1] > chosen:
            found |= best[:, chosen - 1] - best[:, chosen] < NEARLY_TIED * logits.std(-1)
    return found


def on_card(card: Card, hf: Any, *, pages: int = 64, chunk_tokens: int = 2048) -> OfflinePrefill:
    tensors = saved(hf).items()
    return OfflinePrefill(card, hf.config, tensors, pages=pages, chunk_tokens=chunk_tokens)


def saved(hf: Any) -> dict[str, torch.Tensor]:
    return dict(as_saved(hf.state_dict()))


class Case(NamedTuple):
    """A model and a prompt of `length` tokens, cut into chunks at `cuts`."""

    kind: str
    layers: int
    head_dim: int
    length: int
    cuts: tuple[int, ...] = ()
    spread: bool = True
    hidden: int = 256


CASES = [
    *(Case("qwen3", 2, 64, n) for n in (1, 31, 32, 33, 64, 100)),
    Case("qwen3", 4, 128, 100),
    Case("qwen3", 4, 128, 100, (64,)),
    Case("qwen3", 4, 64, 100, (64,), spread=False),
    Case("qwen3", 2, 32, 200, (32, 96, 128)),
    Case("qwen2", 2, 64, 77, (32,)),
    Case("llama", 2, 64, 130, (128,)),
    Case("qwen3, biases", 2, 64, 77, (32,)),
    Case("llama, biases", 2, 64, 70, (64,)),
    Case("llama", 1, 64, 33, spread=False, hidden=8192),
    Case("qwen2.5", 2, 64, 77, (32,), spread=False),
    Case("mistral", 2, 64, 100, (64,)),
    Case("mistral", 2, 128, 100, (64,), spread=False),
    Case("mistral, a wide window", 2, 64, 65, spread=False),
    Case("phi3", 2, 64, 100, (64,)),
    Case("phi3", 2, 64, 100, (64,), spread=False),
    Case("phi3, longrope", 2, 64, 232, (32,), spread=False),
    Case("qwen3_moe, all chosen", 2, 64, 77, (32,)),
    # Spread, what BF16 leaves of a router's input would choose other experts here and there.
    Case("qwen3_moe", 2, 64, 100, (64,), spread=False),
    Case("qwen3_moe, some dense", 3, 64, 65, spread=False),
]


class Bounds(NamedTuple):
    """Least correlation of logits, of K and V; how far the expected logit of the best id may lie
    behind the largest, in deviations, but for one position."""

    logits: float
    kv: float
    clear: float


# Packing the weights of a spread model of four layers alone leaves K and V at 0.9992.
BOUNDS = {
    True: {"packed": Bounds(0.9993, 0.999, 0.1), "unrounded": Bounds(0.998, 0.9985, 0.25)},
    False: {"packed": Bounds(0.9995, 0.9995, 0.1), "unrounded": Bounds(0.999, 0.999, 0.2)},
}


def behind_the_best(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """At each position, in deviations. Both [positions, ids]; 0 where they agree."""
    chosen = expected.gather(-1, logits.argmax(-1, keepdim=True))[:, 0]
    return (expected.max(-1).values - chosen) / expected.std()


def check_agreement(card: Card, rng: np.random.Generator, case: Case) -> None:
    """Logits, K and V against transformers in float32."""
    kind, layers, head_dim, length, cuts, spread, hidden = case
    hf = random_model(
        kind,
        layers=layers,
        head_dim=head_dim,
        kv_heads=max(2, card.chips),
        hidden=hidden,
        spread=spread,
    )
    tokens = rng.integers(0, 512, length)
    pages = rng.permutation(np.arange(1, 40))[: pages_of(length)]
    runtime = on_card(card, hf)
    parts = [runtime.prefill([chunk])[0] for chunk in split(tokens, cuts, pages)]
    logits = torch.cat(parts).float()
    used = torch.from_numpy(pages)

    # Against the same weights, packed; and against the checkpoint's, which the format rounds.
    for model, weights in ((with_packed_weights(hf), "packed"), (hf, "unrounded")):
        least = BOUNDS[spread][weights]
        expected = by_transformers(model, tokens)
        found = [correlation(logits, expected.logits)]
        behind = behind_the_best(logits, expected.logits)
        noise = 2 * math.sqrt(max(0.0, 1 - found[0]))  # of a difference of two logits
        # Where another expert may have run, by that position's own noise.
        own = (logits - expected.logits).std(-1) / expected.logits.std()
        most = torch.where(expected.tied, 8 * own, 6 * noise).clamp(min=least.clear)
        assert (behind > least.clear)[~expected.tied].sum() <= 1 and (behind <= most).all()
        for layer, kv in enumerate(expected.kv):
            for which, values in enumerate(kv):
                got = bfp8_unpack(runtime.host[layer][which][used][:, :, None])
                rows = got.transpose(0, 1).flatten(1, 2)[:, :length]
                found.append(correlation(rows, values))
        shown = " ".join(f"{value:.5f}" for value in found)
        print(f"weights {weights}: correlation of logits, K and V of each layer: {shown}")
        assert found[0] >= least.logits
        assert min(found[1:]) >= least.kv


def drawn(rng: np.random.Generator, pages: int) -> list[Chunk]:
    """Requests with pages of their own among 1 .. pages - 1."""
    free = rng.permutation(np.arange(1, pages)).tolist()
    found = []
    for _ in range(int(rng.integers(1, 6))):
        length = int(rng.integers(1, 90))
        own = np.array([free.pop() for _ in range(pages_of(length))])
        found.append(Chunk(rng.integers(0, 500, length), 0, own))
    return found


def same_pages(one: OfflinePrefill, other: OfflinePrefill, chunks: list[Chunk]) -> bool:
    """Of whole pages; what lies behind a last token is nobody's."""
    used = torch.from_numpy(np.concatenate([c.pages[: c.end // PAGE] for c in chunks]))
    return all(
        torch.equal(one.host[layer][which][used], other.host[layer][which][used])
        for layer in range(len(one.host))
        for which in (0, 1)
    )


def check_traces(card: Card, rng: np.random.Generator, kind: str, layers: int, chunk: int) -> None:
    """Traces compute what calls do. A replay that used anything but this batch's inputs would show:
    batches differ."""
    hf = random_model(kind, vocab=500, layers=layers)
    traced, called = (on_card(card, hf, chunk_tokens=chunk) for _ in range(2))
    traced.runner.warm_up(traces=True)
    assert traced.runner.facts()["traces"] == len(traced.runner.lanes)
    for _ in range(6):
        chunks = drawn(rng, 64)
        answers = [runtime.prefill(chunks, last=True) for runtime in (traced, called)]
        for one, other in zip(*answers, strict=True):
            assert torch.equal(one, other) and one.isfinite().all()
        assert same_pages(traced, called, chunks)
        assert traced.stored == called.stored == list(range(layers))
        for runtime in (traced, called):
            runtime.stored.clear()
    for runtime in (traced, called):
        runtime.close()
