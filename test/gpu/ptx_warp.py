"""One warp that runs PTX as Triton emits it, on numpy arrays of 32 lanes: a kernel's lanes,
registers, inline assembly and fragments, from the PTX ISA's description, without a GPU.

Branches must be uniform, as they are where a program is one warp and loops over scalars.
"""

import re
from collections.abc import Sequence

import numpy as np
import ptx

LANE = np.arange(32)
DTYPES = {
    **{"pred": np.bool_, "f32": np.float32, "f16": np.float16, "b8": np.uint8},
    **{f"{kind}{n}": np.dtype(f"u{n // 8}") for kind in "bu" for n in (16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (16, 32, 64)},
}
REGISTERS = {"%p": "pred", "%rs": "b16", "%rd": "b64", "%r": "b32"}
TOKEN = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]][^,]*")
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARE |= {"gt": np.greater, "ge": np.greater_equal}
BINARY = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and},
    **{"or": np.bitwise_or, "xor": np.bitwise_xor, "min": np.fmin, "max": np.fmax},
}


class Memory:
    """Arrays at addresses that lie far apart, so that whoever reads beyond one is noticed."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def place(self, array: np.ndarray) -> int:
        """The address of a C-contiguous array, which is read and written in place."""
        self._arrays.append(array.reshape(-1).view(np.uint8))
        return len(self._arrays) << 40

    def _bytes(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        owner = int(addresses[0]) >> 40
        array, at = self._arrays[owner - 1], addresses - np.uint64(owner << 40)
        assert owner > 0 and int(at.max()) + size <= len(array), "outside of an array"
        return array, at.astype(np.int64)[:, None] + np.arange(size)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        array, at = self._bytes(addresses, size)
        return array[at]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        array, at = self._bytes(addresses, values.shape[1])
        array[at] = values


class Warp:
    def __init__(self, source: str, memory: Memory) -> None:
        body = re.sub(r"//[^\n]*|^\s*\.loc[^\n]*", "", source, flags=re.MULTILINE)
        body = body[body.index("{") : body.rindex("ret;") + len("ret;")]
        self._memory = memory
        self._code: list[tuple[str, str, list[str]]] = []
        self._labels: dict[str, int] = {}
        for statement in re.findall(r"^\s*(\$\w+:|@?!?[%a-z][^;]*;)", body, re.MULTILINE):
            if statement.endswith(":"):
                self._labels[statement[:-1]] = len(self._code)
                continue
            found = re.fullmatch(r"(@!?%p\d+)?\s*([a-z][\w.:]*)\s*(.*);", statement, re.DOTALL)
            assert found, statement
            operands = [each.strip() for each in TOKEN.findall(found[3])]
            self._code.append((found[1] or "", found[2], operands))

    def run(self, parameters: Sequence[int | float], block: tuple[int, int]) -> None:
        """parameters: in order, float for .f32."""
        self._parameters, self._block = parameters, block
        self._registers: dict[str, np.ndarray] = {}
        self._shared = np.zeros(1 << 16, np.uint8)
        at = 0
        with np.errstate(all="ignore"):
            while True:
                predicate, opcode, operands = self._code[at]
                name, *kinds = opcode.split(".")
                active = self._active(predicate)
                at += 1
                if name == "bra":
                    assert active.all() or not active.any(), "a branch that is not uniform"
                    at = self._labels[operands[-1]] if active.all() else at
                elif name == "ret":
                    return
                elif active.any():
                    getattr(self, f"_{name}", self._compute)(name, kinds, operands, active)

    def _active(self, predicate: str) -> np.ndarray:
        if not predicate:
            return np.ones(32, np.bool_)
        value = self._registers[predicate.lstrip("@!")]
        return ~value if "!" in predicate else value

    def _get(self, operand: str, kind: str) -> np.ndarray:
        dtype = np.dtype(DTYPES[kind])
        if operand in self._registers:
            value = self._registers[operand]
            if value.dtype.itemsize != dtype.itemsize:  # the lower part, or a 32-bit address
                value = value.astype(f"u{dtype.itemsize}")
            return value.view(dtype)
        special = {"%tid.x": LANE, "%ctaid.x": self._block[0], "%ctaid.y": self._block[1]}
        if operand in special:
            return np.broadcast_to(np.asarray(special[operand]), 32).astype(dtype)
        if operand.startswith("0f"):
            return np.full(32, int(operand[2:], 16), np.uint32).view(np.float32)
        if operand == "global_smem":
            return np.zeros(32, dtype)
        number = int(operand.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
        return np.full(32, number, f"u{dtype.itemsize}").view(dtype)

    def _set(self, to: str, value: np.ndarray, active: np.ndarray) -> None:
        kind = next((k for prefix, k in REGISTERS.items() if re.match(prefix + r"\d", to)), "b32")
        if value.dtype != np.bool_:
            value = value.view(f"u{value.dtype.itemsize}")
            value = value.astype(DTYPES[kind])
        old = self._registers.get(to, np.zeros_like(value))
        self._registers[to] = value if active.all() else np.where(active, value, old)

    def _address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        return self._get(base.strip(), "u64") + np.uint64(int(offset or 0))

    @staticmethod
    def _parts(operand: str) -> list[str]:
        return [each.strip() for each in operand.strip("{} ").split(",")]

    def _ld(self, _: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        dtype = np.dtype(DTYPES[kinds[-1]])
        if kinds[0] == "param":
            value = self._parameters[int(operands[1].strip("[]").rsplit("_", 1)[1])]
            single = np.array(value, np.float32 if isinstance(value, float) else np.int64)
            single = single if single.dtype == np.float32 else single.astype(f"i{dtype.itemsize}")
            self._set(operands[0], np.broadcast_to(single, 32).copy(), active)
            return
        to = self._parts(operands[0])
        size = dtype.itemsize * len(to)
        raw = np.zeros((32, size), np.uint8)
        at = self._address(operands[1])[active]
        if kinds[0].startswith("shared"):
            raw[active] = self._shared[at.astype(np.int64)[:, None] + np.arange(size)]
        else:
            raw[active] = self._memory.load(at, size)
        for i, value in enumerate(np.ascontiguousarray(raw).view(dtype).T):
            self._set(to[i], np.ascontiguousarray(value), active)

    def _st(self, _: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        values = [self._get(each, kinds[-1]) for each in self._parts(operands[1])]
        raw = np.ascontiguousarray(np.stack(values, 1)).view(np.uint8)
        at = self._address(operands[0])[active]
        if kinds[0].startswith("shared"):
            self._shared[at.astype(np.int64)[:, None] + np.arange(raw.shape[1])] = raw[active]
        else:
            self._memory.store(at, raw[active])

    def _rows(self, operand: str, count: int) -> np.ndarray:
        """Where matrix rows, at addresses that lanes hold, have their bytes [count, 8, 16].

        A matrix is 8x8 of 16 bits.
        """
        at = self._address(operand)[: 8 * count].astype(np.int64)
        return (at[:, None] + np.arange(16)).reshape(count, 8, 16)

    def _stmatrix(self, _: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        assert "trans" not in kinds
        from_ = self._parts(operands[1])
        for register, at in zip(from_, self._rows(operands[0], len(from_)), strict=True):
            values = self._get(register, "b32").reshape(8, 4)
            self._shared[at] = np.ascontiguousarray(values).view(np.uint8)

    def _ldmatrix(self, _: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        to = self._parts(operands[0])
        for register, at in zip(to, self._rows(operands[1], len(to)), strict=True):
            matrix = self._shared[at].view(np.uint16)
            matrix = np.ascontiguousarray(matrix.T if "trans" in kinds else matrix)
            self._set(register, matrix.view(np.uint32).reshape(32), active)

    def _bar(self, *_: object) -> None:
        """Lanes go together."""

    def _shfl(self, _: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        lane = self._get(operands[2], "s32")
        source = LANE ^ lane if "bfly" in kinds else lane & 31
        self._set(operands[0], self._get(operands[1], "b32")[source], active)

    def _mma(self, _: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        """m16n8k16: a lane is 4 * r + c; see "Matrix Fragments for mma.m16n8k16"."""
        assert kinds[2:] == ["m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"]
        d, a, b, c = (self._parts(each) for each in operands)
        row, pair = LANE // 4, LANE % 4 * 2
        left, right = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        for i, register in enumerate(a):
            for j in range(2):
                values = ptx.halves(self._get(register, "b32"))[:, j]
                left[row + i % 2 * 8, pair + j + i // 2 * 8] = values
        for i, register in enumerate(b):
            for j in range(2):
                right[pair + j + i * 8, row] = ptx.halves(self._get(register, "b32"))[:, j]
        product = left @ right
        for i, (to, addend) in enumerate(zip(d, c, strict=True)):
            value = product[row + i // 2 * 8, pair + i % 2] + self._get(addend, "f32")
            self._set(to, value, active)

    def _mov(self, _: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        to, from_ = operands
        if to.startswith("{"):
            halves = self._get(from_, "b32").view(np.uint16).reshape(32, 2)
            for i, each in enumerate(self._parts(to)):
                self._set(each, halves[:, i].copy(), active)
        elif from_.startswith("{"):
            halves = np.stack([self._get(each, "b16") for each in self._parts(from_)], 1)
            self._set(to, np.ascontiguousarray(halves).view(np.uint32)[:, 0], active)
        else:
            self._set(to, self._get(from_, kinds[0]), active)

    def _setp(self, _: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        a, b = (self._get(each, kinds[-1]) for each in operands[1:])
        self._set(operands[0], COMPARE[kinds[0]](a, b), active)

    def _selp(self, _: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        a, b = (self._get(each, kinds[0]) for each in operands[1:3])
        self._set(operands[0], np.where(self._registers[operands[3]], a, b), active)

    def _bfe(self, _: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        value, start, length = self._get(operands[1], kinds[0]), *map(int, operands[2:])
        up = 32 - start - length
        self._set(operands[0], (value << up) >> (32 - length), active)

    def _cvt(self, _: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        if kinds[-2] == "bf16x2":  # the first operand is the upper half
            high, low = (self._get(each, "f32") for each in operands[1:])
            self._set(operands[0], ptx.pack(np.stack([low, high], 1)), active)
        elif kinds[-2] == "bf16":
            value = ptx.pack(np.stack([self._get(operands[1], "f32")] * 2, 1))
            self._set(operands[0], value.astype(np.uint16), active)
        elif kinds[-1] == "bf16":
            value = self._get(operands[1], "b16").astype(np.uint32) << np.uint32(16)
            self._set(operands[0], value, active)
        else:
            value = self._get(operands[1], kinds[-1]).astype(DTYPES[kinds[-2]])
            self._set(operands[0], value, active)

    def _mad(self, _: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        a, b = (self._get(each, kinds[-1]) for each in operands[1:3])
        kind = kinds[-1]
        if kinds[0] in ("wide", "hi"):
            assert kind[1:] == "32"
            kind = f"{kind[0]}64"
        product = a.astype(DTYPES[kind]) * b.astype(DTYPES[kind])
        if kinds[0] == "hi":
            product = (product >> 32).astype(DTYPES[kinds[-1]])
        kind = kinds[-1] if kinds[0] == "hi" else kind
        added = self._get(operands[3], kind) if len(operands) > 3 else 0
        self._set(operands[0], product + added, active)

    def _mul(self, name: str, kinds: list[str], operands: list[str], active: np.ndarray) -> None:
        multiply = self._compute if kinds[-1] == "f32" else self._mad
        multiply(name, kinds, operands, active)

    def _compute(
        self, name: str, kinds: list[str], operands: list[str], active: np.ndarray
    ) -> None:
        kind = kinds[-1]
        if kind == "bf16x2" or name == "prmt":
            full = f"{name}.{'.'.join(kinds)}"
            values = [self._get(each, "b32") for each in operands[1:]]
            self._set(operands[0], ptx.OPCODES[full](*values), active)
            return
        a, *more = (self._get(each, kind) for each in operands[1:])
        if name in ("shl", "shr"):
            count = self._get(operands[2], "u32").astype(a.dtype)
            moved = a << count if name == "shl" else a >> count
            # Beyond the width there is nothing left; C would say undefined.
            value = np.where(count < 8 * a.itemsize, moved, a.dtype.type(0))
        elif name in BINARY:
            value = BINARY[name](a, more[0])
        elif name == "fma":
            value = (a.astype(np.float64) * more[0] + more[1]).astype(np.float32)
        elif name == "div" and kind == "f32":
            value = a / more[0]
        elif name == "div":
            value = (np.abs(a) // np.abs(more[0])) * (np.sign(a) * np.sign(more[0]))
            value = value.astype(a.dtype)
        else:
            value = {"ex2": np.exp2, "not": np.invert, "neg": np.negative}[name](a)
        self._set(operands[0], value, active)
