from pathlib import Path

from sglang_hma.kvcache.pool import untouched_zeros


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_pages_take_memory_when_they_are_written() -> None:
    shape = (4096, 4, 32, 1088)  # half a GiB
    before = resident_bytes()
    pages = untouched_zeros(shape)
    assert tuple(pages.shape) == shape and pages.is_contiguous()
    assert pages.data_ptr() % 4096 == 0
    assert resident_bytes() - before < 64 << 20
    pages[::1024] = 7
    assert pages[1024].eq(7).all() and not pages[1025].any() and not pages[-1].any()
