"""How far an attention output may be from its float64 definition."""

import os

import numpy as np
import torch

NOISE = 4e-3  # weights are rounded to bfloat16 for the product with V


def assert_accurate(got: torch.Tensor, expected: np.ndarray) -> None:
    """The output's own rounding, and noise against the row's largest value.

    Triton's interpreter stores float32 as bfloat16 by cutting it off, an error of a whole unit in
    the last place; a GPU rounds to nearest.
    """
    cut_off = got.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    allowed = torch.finfo(got.dtype).eps / (1 if cut_off else 2) * np.abs(expected)
    allowed += NOISE * np.abs(expected).max(-1, keepdims=True, initial=0)
    error = np.abs(got.double().numpy() - expected)
    assert np.isfinite(error).all() and (error <= allowed).all(), np.max(error / allowed)
