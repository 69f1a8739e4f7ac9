"""What a family's logprobs are to be: transformers in float64, as it is and with our formats.

The formats come from their numpy definition and are laid over transformers' own modules, by rules
that share nothing with the server's: a matrix is a router if it maps to one number an expert.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hma_kernels import reference


class Truth:
    """Of one model, in float64."""

    def __init__(self, model: Any, experts: int) -> None:
        self.model = model
        self.rounded = copy.deepcopy(model)
        _round_weights(self.rounded, experts)

    @classmethod
    def of(cls, checkpoint: Path) -> "Truth":
        """Of a dense model."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
        return cls(model.eval(), experts=0)

    def with_adapter(self, folder: Path) -> "Truth":
        """With a LoRA adapter that peft has saved: its factors are as they are, beside weights with
        and without our formats."""
        from peft import PeftModel

        other = copy.copy(self)
        for name in ("model", "rounded"):
            base = copy.deepcopy(getattr(self, name))
            setattr(other, name, PeftModel.from_pretrained(base, folder).double().eval())
        return other

    def native(self, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        """Logprobs [len(prompt) + len(tokens) - 1, vocabulary] of what follows each token."""
        from transformers import DynamicCache

        return _logprobs(self.model, [*prompt, *tokens[:-1]], DynamicCache())

    def bfp8(self, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        """The same with rounded weights and K and V in the prompt, and K and V in BF16 behind."""
        cache = _stored_cache()
        parts = [_logprobs(self.rounded, prompt, cache)]
        cache.packs = False
        if len(tokens) > 1:
            parts.append(_logprobs(self.model, tokens[:-1], cache))
        return torch.cat(parts)

    def regrets(self, prompt: list[int], tokens: list[int], *, rounded: bool = True) -> list[float]:
        """How far below the best logprob each of `tokens` lies, given the prompt and those before.

        A greedy decoder with the same arithmetic has regret 0 everywhere; the continuation is the
        given one, so a tie early on hides no later token.
        """
        found = (self.bfp8 if rounded else self.native)(prompt, tokens)[len(prompt) - 1 :]
        return _below_best(found, tokens)

    def next_regrets(
        self, turn: tuple[list[int], list[int]], prompt: list[int], tokens: list[int], kept: int
    ) -> list[float]:
        """The same of one server with a prefix cache that has answered `turn`, (prompt, tokens),
        before: of that it has the first `kept` tokens of `prompt`."""
        if not kept:
            return self.regrets(prompt, tokens)
        cache = _stored_cache()
        _logprobs(self.rounded, turn[0], cache)
        cache.packs = False
        _logprobs(self.model, turn[1][:-1], cache)
        cache.crop(kept)
        cache.packs = True
        found = [_logprobs(self.rounded, prompt[kept:], cache)[-1:]]
        cache.packs = False
        found.append(_logprobs(self.model, tokens[:-1], cache))
        return _below_best(torch.cat(found), tokens)


class Conversation:
    """A pair's answers to the turns of a conversation, with --hma-decode-cache all, in float64.

    Prefill computes each prompt with its rounded weights and its own K and V, also of what decode
    said before. Decode has pages from earlier turns, those that it generated among them, and of
    the rest of the prompt what prefill computed.
    """

    def __init__(self, truth: Truth) -> None:
        self._truth = truth
        self._decode: Any = None

    def logprobs(self, prompt: list[int], tokens: list[int], kept: int) -> torch.Tensor:
        """Of each of `tokens`, which answer `prompt`: [len(tokens), vocabulary]. `kept`: how many
        tokens of the prompt decode has from the turns before."""
        prefill = _stored_cache()
        first = _logprobs(self._truth.rounded, prompt, prefill)[-1:]
        decode = _stored_cache()
        decode.packs = False
        for index, sent in enumerate(prefill.layers):
            keys, values = sent.keys[:, :, kept:], sent.values[:, :, kept:]
            if kept:
                before = self._decode.layers[index]
                keys = torch.cat([before.keys[:, :, :kept], keys], 2)
                values = torch.cat([before.values[:, :, :kept], values], 2)
            decode.update(keys, values, index)
        self._decode = decode
        if len(tokens) == 1:
            return first
        return torch.cat([first, _logprobs(self._truth.model, tokens[:-1], decode)])


def _below_best(found: torch.Tensor, tokens: list[int]) -> list[float]:
    return list((found.max(-1).values - found[range(len(tokens)), tokens]).tolist())


@torch.no_grad()
def _logprobs(model: Any, ids: list[int], cache: Any) -> torch.Tensor:
    logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0]
    return torch.log_softmax(logits.double(), -1)


def _through(x: torch.Tensor, rounding: str) -> torch.Tensor:
    """unpack(pack(x)); x float64 [..., rows, columns] that float32 holds exactly."""
    rows, columns = x.shape[-2:]
    packed = reference.pack(x.float().numpy(), rounding)
    unpacked = np.asarray(reference.unpack(packed), np.float64)
    return torch.from_numpy(unpacked[..., :rows, :columns].copy())


def _stored_cache() -> Any:
    from transformers import DynamicCache

    class Stored(DynamicCache):
        packs = True

        def update(self, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            kept = [states.bfloat16().double() for states in (keys, values)]
            if self.packs:
                kept = [_through(states, "device") for states in kept]
            return super().update(*kept, layer, *args, **kwargs)

    return Stored()


@torch.no_grad()
def _round_weights(model: Any, experts: int) -> None:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # a tied embedding stays
    for module in model.modules():
        if isinstance(module, Conv1D):  # [in, out]
            module.weight.data = _through(module.weight.data, "host")
        elif isinstance(module, torch.nn.Linear):
            if not experts or module.out_features not in (1, experts):
                module.weight.data = _through(module.weight.data.T, "host").T.contiguous()
        else:
            for weight in module.parameters(recurse=False):
                if weight.dim() == 3:
                    rounded = [_through(one, "host") for one in _as_in_out(module, weight.data)]
                    weight.data = _as_in_out(module, torch.stack(rounded)).contiguous()


def _as_in_out(module: torch.nn.Module, experts: torch.Tensor) -> torch.Tensor:
    """Most of transformers' experts are [experts, out, in], gpt-oss's [experts, in, out]."""
    return experts if type(module).__name__ == "GptOssExperts" else experts.transpose(1, 2)
