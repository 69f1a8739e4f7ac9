"""Chains of drafted tokens.

A chain of n tokens begins with a request's last token, whose KV is not stored yet; n - 1 drafts
follow, each a guess of what comes after the one before it. A forward over the chain gives n
targets: what the model says after each of its tokens. Draft j is right if it is target j - 1 and
all drafts before it are right. So targets 0 to k, of k right drafts, are what decoding one token
at a time would have given.
"""

import numpy as np
import numpy.typing as npt
import torch


def deepest_path(tokens: npt.NDArray[np.int64], sees: npt.NDArray[np.bool_]) -> list[int]:
    """The tokens from the root of a tree to its deepest node, the first of several.

    tokens: [n], the root first. sees: [n, n], whether node i is j or comes after j.
    """
    depth = sees.sum(-1)
    path = np.flatnonzero(sees[int(depth.argmax())])
    # Nodes are in the order of their depth, and so are those of a path.
    return [int(token) for token in tokens[path]]


def chains(
    tokens: npt.NDArray[np.int64], sees: npt.NDArray[np.int64], width: int
) -> npt.NDArray[np.int64]:
    """Each request's tree of `width` nodes as a chain [requests, width], filled with its last
    token: a guess like any other.

    tokens: [requests * width], sees: [requests * width * width], as SGLang's NgramCorpus has them.
    """
    trees = zip(tokens.reshape(-1, width), sees.reshape(-1, width, width).astype(bool), strict=True)
    paths = [deepest_path(*tree) for tree in trees]
    return np.array([path + path[-1:] * (width - len(path)) for path in paths], dtype=np.int64)


def tokens_said(chain: torch.Tensor, targets: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """How many of `targets` count: the right drafts and one, but `most` at most.

    chain, targets: int64 [requests, n]; most: int64 [requests], at least 1. Returns int64
    [requests].
    """
    right = (chain[:, 1:] == targets[:, :-1]).long().cumprod(-1).sum(-1)
    return torch.minimum(right + 1, most)
