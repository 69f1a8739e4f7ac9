"""Which tokens a draft model computes in a step."""

import random
from types import SimpleNamespace

from sglang_hma.speculation.catching_up import shares, tokens_of


def test_each_request_gets_what_it_lacks_where_that_is_little() -> None:
    assert shares([1, 1, 2, 40], 1024) == [1, 1, 2, 40]
    assert shares([5000, 1, 2], 1024) == [1021, 1, 2]
    assert shares([900, 5000, 800], 1024) == [224, 0, 800]
    assert shares([], 1024) == []


def test_all_catch_up_in_the_end(seed: int) -> None:
    rng = random.Random(seed)
    gaps, steps = [rng.randrange(1, 3000) for _ in range(12)], 0
    total = sum(gaps)
    while any(gap > 1 for gap in gaps):
        counts = shares(gaps, 100)
        assert sum(counts) == min(100, sum(gaps)) and all(
            count <= gap for count, gap in zip(counts, gaps, strict=True)
        )
        # What was the last token has one behind it in the next step.
        gaps = [gap - count or 1 for gap, count in zip(gaps, counts, strict=True)]
        steps += 1
    assert steps <= total / (100 - 12) + 1


def test_tokens_of_a_prompt_and_its_answer(seed: int) -> None:
    rng = random.Random(seed)
    prompt, answer = list(range(rng.randrange(1, 50))), list(range(100, 100 + rng.randrange(1, 50)))
    req = SimpleNamespace(origin_input_ids_unpadded=prompt, output_ids=answer)
    whole = prompt + answer
    for _ in range(50):
        start = rng.randrange(len(whole))
        end = rng.randrange(start, len(whole) + 1)
        assert tokens_of(req, start, end) == whole[start:end]
