"""What replaces SGLang's Triton kernels on a CPU, against their definition in float64."""

import numpy as np
import pytest
import torch

from sglang_hma.cpu_ops import gate_sigmoid_mul, softcap_logits


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("apart", [False, True])
def test_softcap(seed: int, cap: float | None, apart: bool) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(7, 65) * 10
    given = logits.numpy().astype(np.float64)
    expected = given if cap is None else cap * np.tanh(given / cap)
    output = torch.empty_like(logits) if apart else None
    found = softcap_logits(None, logits, cap, output)  # type: ignore[arg-type]
    assert found is (output if apart else logits)
    assert np.allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("add", [False, True])
def test_the_gate_of_shared_experts(seed: int, add: bool) -> None:
    torch.manual_seed(seed)
    hidden, shared, before = (torch.randn(9, 64) for _ in range(3))
    weight, output = torch.randn(64), before.clone()
    gate_sigmoid_mul(None, hidden, weight, shared, output, do_add=add)  # type: ignore[arg-type]
    h, w, s, b = (x.numpy().astype(np.float64) for x in (hidden, weight, shared, before))
    expected = s / (1 + np.exp(-(h @ w)))[:, None] + (b if add else 0)
    assert np.allclose(output.numpy(), expected, rtol=1e-5, atol=1e-6)
    alone = before[3:4].clone()
    gate_sigmoid_mul(None, hidden[3:4], weight, shared[3:4], alone, do_add=add)  # type: ignore[arg-type]
    assert torch.equal(alone[0], output[3])
