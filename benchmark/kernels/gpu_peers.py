"""FlashInfer's decode kernels over the pages of a Case: which of them is best differs by shape."""

from collections.abc import Callable
from typing import Any

import torch

from benchmark.kernels.gpu_case import DEVICE, DIM, KV_HEADS, Q_HEADS, SCALE, Case, Run
from hma_kernels import PAGE

WORKSPACE_BYTES = 256 << 20

Make = Callable[[Case, torch.Tensor, torch.Tensor], Run]


def _wrapper(**options: Any) -> Make:
    def make(case: Case, k: torch.Tensor, v: torch.Tensor) -> Run:
        import flashinfer

        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", **options)
        wrapper.plan(
            case.indptr.int(),
            case.indices.int(),
            ((case.lengths - 1) % PAGE + 1).int(),
            *(Q_HEADS, KV_HEADS, DIM, PAGE),
            q_data_type=torch.bfloat16,
            kv_data_type=k.dtype,
            sm_scale=SCALE,
        )
        return lambda layer: wrapper.run(case.q, (k[layer], v[layer]), out=case.out)

    return make


def _xqa(case: Case, k: torch.Tensor, v: torch.Tensor) -> Run:
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)
    counts = case.indptr.diff().tolist()
    tables = torch.zeros((case.batch, max(counts)), dtype=torch.int32, device=DEVICE)
    for row, pages in enumerate(case.indices.int().split(counts)):
        tables[row, : len(pages)] = pages
    lengths, longest = case.lengths.int(), int(case.lengths.max())

    def run(layer: int) -> None:
        xqa_batch_decode_with_kv_cache(
            *(case.q, (k[layer], v[layer]), workspace, tables, lengths, longest),
            bmm1_scale=SCALE,
            bmm2_scale=1.0,
            out=case.out,
            kv_layout="HND",
        )

    return run


PEERS: dict[str, tuple[torch.dtype, Make]] = {
    f"flashinfer {kind} {name}": (dtype, make)
    for name, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn))
    for kind, make in (
        ("plain", _wrapper(use_tensor_cores=False)),
        ("fa2", _wrapper(use_tensor_cores=True, backend="fa2")),
        ("fa3", _wrapper(use_tensor_cores=True, backend="fa3")),
        ("xqa", _xqa),
    )
    if (kind, name) != ("fa3", "fp8")  # which takes FP8 queries only
}


def build(name: str, lengths: list[int]) -> str:
    """Compiles a peer's kernel by running it once, and holds its answer against ours: "" or what
    is wrong with it."""
    dtype, make = PEERS[name]
    try:
        case = Case(lengths)
        k, v = case.plain(dtype)
        case.triton()(0)
        expected = case.out.float()
        case.out.fill_(torch.nan)
        make(case, k, v)(0)
        error = ((case.out.float() - expected).abs().max() / expected.abs().max()).item()
        allowed = 0.2 if dtype == torch.float8_e4m3fn else 0.02
        return "" if error < allowed else f"its answer is off by {error:.2g} of the largest value"
    except Exception as error:
        text = str(error).strip() or repr(error)
        return f"{type(error).__name__}: {text.splitlines()[-1][:300]}"
