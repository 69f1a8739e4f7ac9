"""The counting of a loop's instructions, and the count of the CUDA decode kernel."""

import random

import pytest

pytest.importorskip("rich", reason="benchmarks print their tables with rich")

from benchmark.kernels import sass
from benchmark.kernels.machine_code import Flow, Instruction, by_kind, parse
from benchmark.kernels.page_cost import BAR_ARCHITECTURE, BAR_GQA, BAR_HEAD_DIM
from hma_kernels.cuda import build

LISTING = """
	code for sm_90
		Function : other
        /*0000*/                   EXIT ;                              /* 0x000000000000794d */
		Function : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe40000000800 */
        /*0010*/                   BSSY B0, 0x70 ;                     /* 0x0000000000007941 */
        /*0020*/              @!P0 BRA 0x60 ;                          /* 0x0000000000007941 */
        /*0030*/                   FADD R1, R1, R1 ;                   /* 0x0000000000007941 */
        /*0040*/                   FADD R1, R1, R1 ;                   /* 0x0000000000007941 */
        /*0050*/                   HMMA.16816.F32.BF16 R4, R4, R6, R4 ;/* 0x0000000000007941 */
        /*0060*/                   BSYNC B0 ;                          /* 0x0000000000007941 */
        /*0070*/                   LDSM.16.M88.4 R4, [R1+0x40] ;       /* 0x0000000000007941 */
        /*0080*/               @P1 BRA 0x10 ;                          /* 0x0000000000007941 */
        /*0090*/                   EXIT ;                              /* 0x0000000000007941 */
        /*00a0*/                   BRA 0xa0 ;                          /* 0x0000000000007941 */
        /*00b0*/                   NOP ;                               /* 0x0000000000007941 */
"""


def test_a_listing() -> None:
    functions = parse(LISTING)
    assert {name: len(code) for name, code in functions.items()} == {"other": 1, "kernel": 12}
    flow = Flow(functions["kernel"])
    with_matrix = flow.shortest_loop({"HMMA": 1, "LDSM": 1})
    assert [each.name for each in with_matrix].count("FADD") == 2
    assert len(with_matrix) == 8
    assert len(flow.shortest_loop({"LDSM": 1})) == 5
    assert by_kind(with_matrix) == {
        **{"control": 4, "floating point": 2, "tensor core": 1, "load matrix": 1}
    }
    with pytest.raises(ValueError, match="no loop"):
        flow.shortest_loop({"LDC": 1})


def random_code(rng: random.Random) -> list[Instruction]:
    size = rng.randrange(6, 16)
    code = []
    for i in range(size):
        name = rng.choice(["FADD", "FADD", "HMMA", "LDSM", "BRA", "BRA", "EXIT"])
        operands = f"0x{16 * rng.randrange(size):x}" if name == "BRA" else "R1"
        predicate = "@P0" if name in ("BRA", "EXIT") and rng.random() < 0.8 else ""
        code.append(Instruction(16 * i, predicate, name, operands))
    return code


def shortest_by_walking(code: list[Instruction], work: dict[str, int]) -> int | None:
    """Of all walks from an instruction to itself, one instruction at a time."""

    def onward(i: int) -> list[int]:
        each = code[i]
        ways = [i + 1] if i + 1 < len(code) else []
        if each.name == "BRA":
            assert each.target is not None
            return [each.target // 16, *(ways if each.predicate else [])]
        return ways if each.name != "EXIT" or each.predicate else []

    reachable, ahead = {0}, [0]
    while ahead:
        new = set(onward(ahead.pop())) - reachable
        reachable |= new
        ahead += new
    lengths = []
    for start in sorted(reachable):
        states = {(start, 0, 0)}
        for length in range(1, 3 * len(code)):
            states = {
                (to, a + (code[i].name == "HMMA"), b + (code[i].name == "LDSM"))
                for i, a, b in states
                for to in onward(i)
            }
            done = ((i, a, b) for i, a, b in states if i == start)
            if any(a >= work["HMMA"] and b >= work["LDSM"] for _, a, b in done):
                lengths.append(length)
                break
    return min(lengths, default=None)


def test_the_shortest_way_around_is_found() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, loops = random.Random(seed), 0
    for _ in range(400):
        code = random_code(rng)
        work = {"HMMA": rng.randrange(1, 3), "LDSM": rng.randrange(0, 2)}
        expected = shortest_by_walking(code, work)
        if expected is None:
            continue
        loops += 1
        assert len(Flow(code).shortest_loop(work)) == expected, code
    assert loops > 0


@pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc in CUDA_HOME, PATH or wheels")
def test_a_page_takes_no_more_instructions_than_it_may() -> None:
    found = sass.count(BAR_ARCHITECTURE, BAR_HEAD_DIM, BAR_GQA)
    # What no compiler can do without: 8192 bytes widened in pairs, by a permutation and a mask each
    # for two of a lane's.
    assert found["names"]["PRMT"] >= 128 and found["names"]["HMMA"] == 32
    assert found["total"] <= sass.BAR, found
