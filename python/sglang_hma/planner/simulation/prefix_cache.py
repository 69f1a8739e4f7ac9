"""Which prompt blocks a server still has, by the hashes of a trace; the least recently used go."""

from collections import OrderedDict

from sglang_hma.planner.trace import HASH_TOKENS, Request


class PrefixCache:
    def __init__(self, tokens: int) -> None:
        """`tokens`: that fit."""
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._room = tokens // HASH_TOKENS

    def match(self, request: Request) -> int:
        """Tokens at the beginning of the prompt that are here. The last one is computed always."""
        blocks = 0
        for each in request.prefix_hashes:
            if each not in self._blocks:
                break
            self._blocks.move_to_end(each)
            blocks += 1
        return min(blocks * HASH_TOKENS, request.input_tokens - 1)

    def insert(self, request: Request) -> None:
        """Whole blocks only: the last hash may stand for less than a block."""
        for each in request.prefix_hashes[: request.input_tokens // HASH_TOKENS]:
            self._blocks[each] = None
            self._blocks.move_to_end(each)
        while len(self._blocks) > self._room:
            self._blocks.popitem(last=False)
