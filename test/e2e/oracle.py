"""transformers in float64 as an independent truth for the phase-wise formats.

Prefill: linear weights through the numpy reference of the host packer, K and V
(after RoPE) rounded to BF16 and through the reference of the device packer.
Decode: the checkpoint's weights, generated K and V rounded to BF16.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hma_kernels import reference


def round_trip(x: torch.Tensor, rounding: str) -> torch.Tensor:
    """unpack(pack(x)) of the numpy reference; x [..., H, W] float64 that fp32 holds exactly."""
    rows, cols = x.shape[-2:]
    packed = reference.pack(x.to(torch.float32).numpy(), rounding)
    unpacked = np.asarray(reference.unpack(packed), dtype=np.float64)
    return torch.from_numpy(unpacked[..., :rows, :cols].copy())


class RoundingCache(DynamicCache):
    """Rounds K and V as they enter the cache, so attention reads what is stored."""

    packs = True

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # type: ignore[no-untyped-def]
        stored = []
        for states in (key_states, value_states):
            rounded = states.to(torch.bfloat16).to(torch.float64)
            stored.append(round_trip(rounded, "device") if self.packs else rounded)
        return super().update(*stored, layer_idx, *args, **kwargs)


class Oracle:
    """Greedy decoding with the formats of a prefill and a decode server."""

    def __init__(self, path: Path) -> None:
        self.decode_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        self.prefill_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        head = self.prefill_model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())  # a tied embedding stays
        for module in self.prefill_model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = round_trip(module.weight.data.T, "host").T.contiguous()

    @torch.no_grad()
    def regrets(self, prompt: list[int], tokens: list[int], *, rounded: bool = True) -> list[float]:
        """How far below the best logit each of `tokens` lies, given the prompt and those before.

        A greedy decoder with the same arithmetic has regret 0 everywhere; the
        continuation is the given one, so a tie early on hides no later token.
        """
        cache = RoundingCache() if rounded else DynamicCache()
        first = self.prefill_model if rounded else self.decode_model
        logits = [self._logits(first, prompt, cache)[-1:]]
        if rounded:
            cache.packs = False
        if len(tokens) > 1:
            # All at once: what each token stores is rounded by itself.
            logits.append(self._logits(self.decode_model, tokens[:-1], cache))
        found = torch.cat(logits)
        return (found.max(-1).values - found[range(len(tokens)), tokens]).tolist()

    @staticmethod
    def _logits(model: torch.nn.Module, ids: list[int], cache: DynamicCache) -> torch.Tensor:
        return model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0]
