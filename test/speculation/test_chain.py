"""Chains of drafts: what becomes of a tree, and how many tokens count."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.speculation.chain import chains, tokens_said


@st.composite
def trees(draw: st.DrawFn, width: int) -> tuple[list[int], list[int]]:
    """(tokens, parents) of a tree's nodes, the root first and each level after the one before."""
    parents = [-1]
    for _ in range(width - 1):
        parents.append(draw(st.integers(max(0, parents[-1]), len(parents) - 1)))
    return draw(st.lists(st.integers(0, 9), min_size=width, max_size=width)), parents


def root_to(node: int, parents: list[int]) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


@given(st.data())
def test_the_deepest_path_of_each_tree(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 8))
    drawn = data.draw(st.lists(trees(width), min_size=1, max_size=4))
    paths = [[root_to(node, parents) for node in range(width)] for _, parents in drawn]
    sees = np.array([[[j in path for j in range(width)] for path in each] for each in paths])
    tokens = np.array([each for each, _ in drawn])
    found = chains(tokens.reshape(-1), sees.astype(np.int64).reshape(-1), width)
    assert found.shape == (len(drawn), width)
    for row, (each, _), nodes in zip(found.tolist(), drawn, paths, strict=True):
        depth = max(map(len, nodes))
        deepest = next(path for path in nodes if len(path) == depth)
        assert row[:depth] == [each[node] for node in deepest]
        assert row[depth:] == [row[depth - 1]] * (width - depth)


@given(st.data())
def test_tokens_that_count(data: st.DataObject) -> None:
    """As a loop: a model that says `answer(prefix)` is asked after each token that it said."""
    width = data.draw(st.integers(1, 8))
    lines = data.draw(st.integers(1, 5))
    token = st.integers(0, 2)
    row = st.lists(token, min_size=width, max_size=width)
    chain, targets = (data.draw(st.lists(row, min_size=lines, max_size=lines)) for _ in "ct")
    most = data.draw(st.lists(st.integers(1, width), min_size=lines, max_size=lines))
    said = tokens_said(*map(torch.tensor, (chain, targets, most)))
    for line in range(lines):
        expected, known = 1, chain[line][:1]
        while (
            expected < most[line]
            and [*known, targets[line][expected - 1]] == chain[line][: expected + 1]
        ):
            known.append(targets[line][expected - 1])
            expected += 1
        assert said[line] == expected


def test_a_chain_that_is_right_to_its_end() -> None:
    chain = torch.tensor([[5, 6, 7, 8]])
    said = tokens_said(chain, torch.tensor([[6, 7, 8, 9]]), torch.tensor([4]))
    assert said.tolist() == [4]
