"""SGLang's NGRAM speculation (--speculative-algorithm NGRAM) where its own worker cannot run.

Drafts come from SGLang's corpus of what was said before, on the host.
"""

import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from sglang.srt.runtime_context import get_spec
from typing_extensions import override

from sglang_hma.speculation.chain import chains
from sglang_hma.speculation.worker import ChainWorker

logger = logging.getLogger(__name__)


class NgramWorker(ChainWorker):
    """Drafts what followed the same tokens before."""

    @override
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        spec = get_spec()
        self._depth: int = spec.speculative_ngram_max_trie_depth
        self._matched: set[str] = set()  # requests of the last step, whose matches are kept
        self._corpus = make_corpus(spec, self._width)

    @property
    @override
    def draft_worker(self) -> None:
        return None

    @override
    def clear_cache_pool(self) -> None:
        self._corpus.reset()
        self._matched = set()

    # What SGLang's /add_external_corpus and its kin call.

    def add_external_corpus(self, corpus_id: str, token_chunks: list[list[int]]) -> int:
        return int(self._corpus.load_external_corpus_named(corpus_id, token_chunks))

    def commit_corpus_load(self, corpus_id: str, loaded_token_count: int) -> None:
        self._corpus.commit_external_corpus_load(corpus_id, loaded_token_count)

    def remove_external_corpus(self, corpus_id: str) -> None:
        self._corpus.remove_external_corpus(corpus_id)

    def list_external_corpora(self) -> dict[str, int]:
        return dict(self._corpus.list_external_corpora())

    def _drafted(self, batch: Any) -> torch.Tensor:
        self._corpus.synchronize()
        tokens, sees = self._corpus.batch_get(
            [req.rid for req in batch.reqs],
            [self._tail(req) for req in batch.reqs],
            [len(req.origin_input_ids_unpadded) + len(req.output_ids) for req in batch.reqs],
        )
        return torch.from_numpy(chains(tokens, sees, self._width)).to(self._device)

    def _tail(self, req: Any, *said: int) -> list[int]:
        """The last tokens of a request, as many as the corpus may match."""
        output = [*req.output_ids[-self._depth :], *said][-self._depth :]
        missing = self._depth - len(output)
        return [*(req.origin_input_ids_unpadded[-missing:] if missing else ()), *output]

    def _remember(self, batch: Any, targets: torch.Tensor, said: torch.Tensor) -> None:
        lines = zip(batch.reqs, targets.tolist(), said.tolist(), strict=True)
        self._corpus.batch_put([self._tail(req, *row[:count]) for req, row, count in lines])
        now = {req.rid for req in batch.reqs}
        if gone := self._matched - now:
            self._corpus.erase_match_state(list(gone))
        self._matched = now


def make_corpus(spec: Any, width: int) -> Any:
    """SGLang's NgramCorpus; it compiles it (C++) at the first start on a machine."""
    if shutil.which("ninja") is None:  # one may be installed beside this Python
        os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    from sglang.srt.speculative.cpp_ngram.ngram_corpus import NgramCorpus

    logger.info("NGRAM: loading the corpus, which is compiled at the first start")
    return NgramCorpus(
        min_bfs_breadth=spec.speculative_ngram_min_bfs_breadth,
        max_bfs_breadth=spec.speculative_ngram_max_bfs_breadth,
        match_type=spec.speculative_ngram_match_type,
        capacity=spec.speculative_ngram_capacity,
        max_trie_depth=spec.speculative_ngram_max_trie_depth,
        draft_token_num=width,
        external_sam_budget=spec.speculative_ngram_external_sam_budget,
        external_corpus_max_tokens=spec.speculative_ngram_external_corpus_max_tokens,
    )
