"""What counts as working: near the truth in both formats, and nothing that is not a number."""

import math

import pytest
import torch

from benchmark.models.outcome import Distance, Measured, distance
from benchmark.models.serving import Answer

NEAR = Distance(prompt=1e-6, said=1e-6, largest=1e-5, other=0)
COST = Distance(prompt=0.1, said=0.1, largest=2.0, other=0)
FAR = Distance(prompt=0.09, said=0.09, largest=2.0, other=0)
LOST = Distance(prompt=math.nan, said=0.1, largest=math.nan, other=0)


@pytest.mark.parametrize(
    ("native", "formats", "cost", "verdict"),
    [
        (NEAR, NEAR, COST, "works"),
        (None, NEAR, COST, "works"),
        (FAR, NEAR, COST, "works"),
        (FAR, FAR, COST, "SGLang differs"),
        (LOST, LOST, COST, "SGLang differs"),
        (Distance(1e-6, 1e-6, 1e-5, other=1), FAR, COST, "SGLang differs"),
        (NEAR, FAR, COST, "wrong"),
        (NEAR, LOST, COST, "wrong"),
        (NEAR, NEAR, LOST, "wrong"),
        (NEAR, NEAR, Distance(3, 3, 9, 0), "wrong"),
    ],
)
def test_verdicts(native: Distance | None, formats: Distance, cost: Distance, verdict: str) -> None:
    found, said = Measured(native, formats, cost, between=0.1).verdict()
    assert found == verdict and bool(said) == (verdict != "works" or native is FAR)


def test_distance_is_of_each_token_that_follows() -> None:
    truth = torch.log_softmax(torch.randn(4, 8).double(), -1)
    best = truth.argmax(-1).tolist()
    worst = truth.argmin(-1).tolist()
    following = [3, 5, best[2], worst[3]]
    exact = truth.gather(1, torch.tensor(following)[:, None])[:, 0].tolist()
    answer = Answer(
        prompt=[1, 3, 5],
        tokens=following[2:],
        prompt_logprobs=[exact[0], exact[1] + 0.5],
        logprobs=[exact[2] - 0.25, exact[3]],
    )
    found = distance([answer], [truth], clear=1e-3)
    assert found.prompt == pytest.approx(0.25) and found.said == pytest.approx(0.125)
    assert found.largest == pytest.approx(0.5) and found.other == 1
