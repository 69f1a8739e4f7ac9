r"""The decode kernels a few times over one large batch, for a profiler:

ncu --clock-control none -k regex:hma_decode_kernel -s 2 -c 1 --set full \
    python -m benchmark.kernels.gpu_profile
"""

import torch

from benchmark.kernels.gpu_case import Case

CALLS = 4


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("gpu_profile needs a GPU; torch sees none")
    case = Case([8192] * 64)
    for run in filter(None, (case.cuda(), case.triton())):
        for _ in range(CALLS):
            run(0)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
