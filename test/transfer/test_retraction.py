"""Who is put aside in a full pool on decode."""

from types import SimpleNamespace
from typing import Any

from sglang_hma.transfer.decode.retraction import retract_decode


def test_a_request_without_its_first_token_is_kept() -> None:
    """With overlap scheduling a prompt that was computed here is in the batch one step before its
    first token is known. SGLang prefers who has said more."""
    outputs = [[1, 2], [], [1], []]
    reqs = [SimpleNamespace(output_ids=said, origin_input_ids=[0] * 9) for said in outputs]

    class Batch:
        @staticmethod
        def _get_decode_retraction_order(reqs: list[Any]) -> list[int]:
            return sorted(range(len(reqs)), key=lambda index: -len(reqs[index].output_ids))

        def release_req(self, index: int, remaining: int) -> bool:
            return True

    def original(batch: Any) -> tuple[list[int], float, list[Any]]:
        return batch._get_decode_retraction_order(reqs), 0.5, []

    batch = Batch()
    order = retract_decode(original, batch)[0]
    assert set(order[:2]) == {1, 3} and order[2:] == [0, 2]
    assert batch._get_decode_retraction_order(reqs)[:2] == [0, 2]
    assert "_get_decode_retraction_order" not in vars(batch) and "release_req" not in vars(batch)
