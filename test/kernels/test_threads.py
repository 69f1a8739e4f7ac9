"""The C++ kernels' thread pool and choice of instruction set."""

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from kernel_cases import Spec

from hma_kernels import DecodePlan, bfp8_pack

cpu = pytest.importorskip("hma_kernels.cpu", reason="no C++ compiler built it")


@pytest.fixture(autouse=True)
def only_once(kernels):
    if kernels != cpu.available_isas()[0]:
        pytest.skip("the pool does not depend on the instruction set")


@pytest.fixture
def threads():
    before = cpu.threads()
    yield cpu.set_threads
    cpu.set_threads(before)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True
    )


@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads_change_no_byte(rng, make_cache, threads, count):
    x = torch.from_numpy(rng.standard_normal((3, 333, 200)))
    lengths = rng.integers(1, 2000, 5).tolist()
    cache = make_cache(Spec(lengths, 2, 64, 64, layers=1))
    q = torch.from_numpy(rng.standard_normal((5, 8, 64))).float()

    def results():
        packed = bfp8_pack(x.float())
        plan = DecodePlan(cache.kv, cache.table, num_q_heads=8)
        return packed, plan.run(q, 0, scale=0.125), plan.run(q.bfloat16(), 0, scale=0.125)

    threads(3)
    packed, exact, rounded = results()
    threads(count)
    again = results()
    assert torch.equal(again[0], packed)
    assert torch.equal(again[1], exact)
    # Work is split by the number of threads, and float32 partial sums with it.
    torch.testing.assert_close(again[2], rounded, rtol=2**-7, atol=1e-5)


def test_callers_take_turns(rng, make_cache, threads):
    threads(3)
    caches = [make_cache(Spec([int(rng.integers(1, 900))] * 3, 2, 32, 32)) for _ in range(6)]
    q = torch.from_numpy(rng.standard_normal((3, 4, 32))).bfloat16()

    def attend(cache):
        return DecodePlan(cache.kv, cache.table, num_q_heads=4).run(q, 1, scale=0.2)

    expected = [attend(cache) for cache in caches]
    wrong = []

    def repeat(cache, result):
        wrong.extend(1 for _ in range(50) if not torch.equal(attend(cache), result))

    callers = [
        threading.Thread(target=repeat, args=pair) for pair in zip(caches, expected, strict=True)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def pack_in_child(x: torch.Tensor, expected: bytes) -> None:
    # Not a torch operation: OpenMP's threads, unlike these, do not survive a fork.
    sys.exit(0 if bfp8_pack(x).numpy().tobytes() == expected else 3)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_threads(rng, threads):
    threads(3)
    x = torch.from_numpy(rng.standard_normal((512, 512))).float()
    expected = bfp8_pack(x).numpy().tobytes()
    child = multiprocessing.get_context("fork").Process(target=pack_in_child, args=(x, expected))
    child.start()
    child.join(600)
    code, alive = child.exitcode, child.is_alive()
    child.kill()
    assert not alive and code == 0


def test_omp_num_threads_is_respected():
    code = "from hma_kernels import cpu; print(cpu.threads())"
    assert run_python(code, OMP_NUM_THREADS="3").stdout.split() == ["3"]
    every = run_python(code, OMP_NUM_THREADS="").stdout.split()
    assert every == [str(len(os.sched_getaffinity(0)))]


def test_instruction_set_by_environment():
    code = "from hma_kernels import cpu; print(cpu.isa())"
    for isa in cpu.available_isas():
        assert run_python(code, HMA_CPU_ISA=isa).stdout.split() == [isa]
    refused = run_python(code, HMA_CPU_ISA="sse9")
    assert refused.returncode != 0
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: HMA_CPU_ISA is sse9; this machine runs ")


def test_implementation_by_environment():
    code = "import torch, hma_kernels; print(hma_kernels.describe(torch.device('cpu')))"
    assert run_python(code).stdout.startswith("kernels: C++ (")
    assert "HMA_KERNELS=portable" in run_python(code, HMA_KERNELS="portable").stdout
    assert "HMA_KERNELS is 'gpu'" in run_python(code, HMA_KERNELS="gpu").stderr
    absent = "import sys; sys.modules['hma_kernels.cpu._ext'] = None; " + code
    assert "hma_kernels.cpu was not built" in run_python(absent).stdout
