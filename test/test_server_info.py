from types import SimpleNamespace

from sglang.srt.disaggregation.utils import ReqToMetadataIdxAllocator

from sglang_hma.server_info import metadata_buffers


def test_metadata_buffers_in_use() -> None:
    allocator = ReqToMetadataIdxAllocator(4)
    scheduler = SimpleNamespace(req_to_metadata_buffer_idx_allocator=allocator)
    controller = SimpleNamespace(scheduler=scheduler)
    taken = allocator.alloc()
    assert metadata_buffers(controller) == {"metadata_buffers": {"total": 4, "in_use": 1}}
    allocator.free(taken)
    assert metadata_buffers(controller)["metadata_buffers"]["in_use"] == 0
    assert metadata_buffers(SimpleNamespace(scheduler=SimpleNamespace())) == {}
