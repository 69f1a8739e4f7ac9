from typing import Any, TypeAlias

import numpy as np

Int64s: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Words: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]
Matrix: TypeAlias = tuple[int, int, int, int, int, int, int]
Query: TypeAlias = tuple[int, int, int, int]
Pages: TypeAlias = tuple[int, int, int, int]
PageList: TypeAlias = tuple[Int64s, Int64s, Int64s, int]
Heads: TypeAlias = tuple[int, int, int, int]

def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(threads: int) -> None: ...
def pack(x: Matrix, host: bool, tiles: int) -> None: ...
def unpack(tiles: int, out: Matrix) -> None: ...
def round(x: Matrix, host: bool, out: int) -> None: ...
def hash(addresses: Int64s, length: int, keys: Words, start: Words, out: Words) -> None: ...
def write_rows(
    x: int,
    type: int,
    shape: tuple[int, ...],
    pages: int,
    page_stride: int,
    page_count: int,
    page_ids: Int64s,
    page_rows: Int64s,
) -> None: ...
def extend_attention(
    heads: Heads,
    bfp8: Pages,
    bf16: Pages,
    bfp8_table: PageList,
    bf16_table: PageList,
    prefix: Int64s,
    q_indptr: Int64s,
    q: Query,
    k: Query,
    v: Query,
    scale: float,
    logit_cap: float,
    sinks: int,
    window: int,
    exact: bool,
    decode: bool,
    out: int,
) -> None: ...

class DecodePlan:
    def __init__(
        self,
        heads: Heads,
        bfp8: PageList,
        bf16: PageList,
        seq_lens: Int64s,
        q_indptr: Int64s,
        window: int,
    ) -> None: ...
    def run(
        self,
        bfp8: Pages,
        bf16: Pages,
        q: Query,
        scale: float,
        logit_cap: float,
        sinks: int,
        out: int,
    ) -> None: ...
