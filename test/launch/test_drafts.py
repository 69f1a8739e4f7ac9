"""Flags of speculation: which go, with which defaults, and what the others are told."""

import pytest

from hma_kernels.ops import MAX_QUERIES
from sglang_hma.config import MOST_DRAFT_TOKENS

from .reading import CPU, DECODE, PREFILL, STANDALONE, refusal, start


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--speculative-alg=STANDALONE"], ["add --speculative-draft-model-path"]),
        (
            [*STANDALONE, "--speculative-num-steps", "8"],
            ["--speculative-num-steps is 8", "use 7 or fewer"],
        ),
        ([*STANDALONE, "--speculative-eagle-topk", "4"], ["--speculative-eagle-topk 4", "chains"]),
        ([*STANDALONE, "--speculative-adaptive"], ["--speculative-adaptive", "leave it out"]),
        (
            [*STANDALONE, "--speculative-draft-attention-backend", "triton"],
            ["--speculative-draft-attention-backend triton", "use"],
        ),
        (
            [*STANDALONE, *PREFILL],
            ["--speculative-algorithm STANDALONE", "where tokens are generated"],
        ),
        ([*STANDALONE, "--enable-lora"], ["STANDALONE", "--lora"]),
    ],
)
def test_draft_models_that_are_refused(argv: list[str], words: list[str]) -> None:
    message = refusal(*CPU, *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("role", [DECODE, []])
def test_drafts_are_chains(role: list[str]) -> None:
    argv = [*CPU, *role, "--speculative-algorithm", "NGRAM"]
    _, server_args = start(*argv)
    assert server_args.speculative_num_draft_tokens == MOST_DRAFT_TOKENS == MAX_QUERIES
    assert server_args.speculative_ngram_max_bfs_breadth == 1
    assert start(*argv, "--speculative-num-draft-tokens", "4")[1].speculative_num_draft_tokens == 4
    assert start(*CPU, *role)[1].speculative_num_draft_tokens is None


@pytest.mark.parametrize("role", [DECODE, []])
def test_a_draft_model_drafts_chains(role: list[str]) -> None:
    def chain(*flags: str) -> tuple[int, int, int]:
        _, given = start(*CPU, *role, *STANDALONE, *flags)
        return (
            given.speculative_num_steps,
            given.speculative_num_draft_tokens,
            given.speculative_eagle_topk,
        )

    assert chain() == (3, 4, 1)
    assert chain("--speculative-num-steps", "6") == (6, 7, 1)
    assert chain("--speculative-num-draft-tokens", "8") == (7, 8, 1)


def test_drafts_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    start(*CPU, *DECODE)
    message = refusal(*CPU, *DECODE, "--speculative-algorithm", "NGRAM")
    assert "no no-such-compiler" in message and "name it in CXX" in message
    start(*CPU, *DECODE, *STANDALONE)  # nothing to compile
