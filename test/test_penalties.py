"""A repetition penalty scales what the others have left, whatever order their classes come in."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.sampling import penaltylib

from sglang_hma import penalties

CLASSES = (
    penaltylib.BatchedFrequencyPenalizer,
    penaltylib.BatchedMinNewTokensPenalizer,
    penaltylib.BatchedPresencePenalizer,
    penaltylib.BatchedRepetitionPenalizer,
)
MADE = penaltylib.BatchedPenalizerOrchestrator.__init__


@dataclass
class Batch:
    reqs: list[Any]
    device: str = "cpu"


def test_in_any_order() -> None:
    params = SimpleNamespace(
        frequency_penalty=1.5, presence_penalty=0.25, repetition_penalty=2.0, min_new_tokens=0
    )
    req = SimpleNamespace(
        sampling_params=params, origin_input_ids=[1], output_ids=[], fill_ids=[1], stop_token_ids=[]
    )
    batch = Batch([req])
    for order in itertools.permutations(CLASSES):
        made = object.__new__(penaltylib.BatchedPenalizerOrchestrator)
        penalties.orchestrate(MADE, made, 4, batch, order)
        made.cumulate_output_tokens(torch.tensor([2]))
        logits = torch.full((1, 4), 6.0)
        made.apply(logits)
        assert logits[0, [0, 2, 3]].tolist() == [6.0, (6 - 1.75) / 2, 6.0]
