"""Token for token: PD == one server == radix hit, and native == transformers."""

import random
from pathlib import Path

import pytest
import torch

from .conftest import COMMON, flush
from .harness import Pair, Server, output_ids, running_pair

LENGTHS = [1, 31, 32, 33, 64, 96, 500]
NEW_TOKENS = 40
VOCAB = 4096

pytestmark = pytest.mark.e2e


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(8, VOCAB - 8) for _ in range(n)] for n in LENGTHS]


def test_pd_equals_single_server_equals_radix_hit(pair: Pair, single: Server, seed: int) -> None:
    for prompt in prompts(seed):
        flush(pair.prefill)
        flush(single)
        cold = output_ids(pair.url, prompt, NEW_TOKENS)
        assert len(set(cold)) > NEW_TOKENS // 4, "the demo model loops: it cannot show an error"
        assert output_ids(single.url, prompt, NEW_TOKENS) == cold, len(prompt)
        assert output_ids(pair.url, prompt, NEW_TOKENS) == cold, len(prompt)
        assert output_ids(single.url, prompt, NEW_TOKENS) == cold, len(prompt)


def test_radix_cache_is_hit(pair: Pair, seed: int) -> None:
    prompt = prompts(seed)[-1]
    from .harness import generate

    generate(pair.url, prompt, 2)
    again = generate(pair.url, prompt, 2)
    assert again["meta_info"]["cached_tokens"] == (len(prompt) - 1) // 32 * 32


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_native_equals_transformers(family: str, tmp_path: Path, logs: Path, seed: int) -> None:
    from transformers import AutoModelForCausalLM

    from sglang_hma.demo_model import make_demo_model

    model = tmp_path / family
    make_demo_model(model, family=family, layers=2)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    flags = (*COMMON, "--hma-kv-format", "native", "--max-total-tokens", "8192")
    with running_pair(model, logs, *flags, name=f"native-{family}") as native:
        for prompt in prompts(seed):
            expected, margins = greedy(hf, prompt, NEW_TOKENS)
            got = output_ids(native.url, prompt, NEW_TOKENS)
            # Past a tie that fp32 noise can turn, the continuations are different texts.
            decided = next((i for i, m in enumerate(margins) if m < 1e-4), NEW_TOKENS)
            assert got[:decided] == expected[:decided], (family, len(prompt))


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of the fp32 model and each one's margin over the runner-up."""
    ids, out, margins = torch.tensor([prompt]), [], []
    cache = None
    for _ in range(tokens):
        result = model(ids, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        top = result.logits[0, -1].topk(2)
        out.append(int(top.indices[0]))
        margins.append(float(top.values[0] - top.values[1]))
        ids = torch.tensor([[out[-1]]])
    return out, margins
