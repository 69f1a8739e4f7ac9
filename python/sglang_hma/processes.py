"""A CPU server's scheduler and detokenizer are forked, not spawned: what they would import for
ten seconds each is there already."""

import gc
import logging
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)


def set_envs_and_config(original: Callable[[Any], None], server_args: Any) -> None:
    """SGLang's own choice of a start method is the last thing in `original`."""
    original(server_args)
    if can_fork(server_args):
        # Of torch's threads only their number survives a fork, and only if it was set.
        if threads := os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads.partition(",")[0]))
        gc.freeze()
        multiprocessing.set_start_method("fork", force=True)


def can_fork(server_args: Any) -> bool:
    """A fork copies no threads, so there must be none; a data parallel controller starts some."""
    alone = server_args.tp_size == server_args.pp_size == server_args.dp_size == 1
    return alone and len(os.listdir("/proc/self/task")) == 1
