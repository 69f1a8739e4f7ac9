"""A stand-in for ttnn where there is no card: the operations that the runtime uses, on torch.

It has the vendor's numerics where the project relies on them: BF16 between operations, both BFP8
packers, attention over the packed pages. It refuses what ttnn refuses of the runtime's calls. A
copy to the host happens when its event is waited for, and fails if the source was freed before. On
a mesh each chip computes with its own part of every tensor, and only all_reduce looks at others'.
"""

# ruff: noqa: F401
from .mesh import (
    Arch,
    BufferType,
    ConcatMeshToTensor,
    FabricConfig,
    MeshCoordinate,
    MeshShape,
    ReplicateTensorToMesh,
    ShardTensorToMesh,
    allocate_tensor_on_host,
    begin_trace_capture,
    close_mesh_device,
    copy_device_to_host_tensor,
    end_trace_capture,
    event_synchronize,
    execute_trace,
    get_device_tensors,
    get_memory_view,
    open_mesh_device,
    record_event,
    release_trace,
    set_fabric_config,
    wait_for_event,
)
from .operations import (
    MathFidelity,
    SDPAProgramConfig,
    UnaryOpType,
    add,
    all_reduce,
    concat,
    embedding,
    experimental,
    ge,
    init_device_compute_kernel_config,
    linear,
    lt,
    mul,
    reshape,
    rms_norm,
    scatter,
    slice,
    softmax,
    to_layout,
    topk,
    transformer,
    typecast,
    where,
)
from .tensors import (
    DRAM_MEMORY_CONFIG,
    L1_MEMORY_CONFIG,
    ROW_MAJOR_LAYOUT,
    TILE_LAYOUT,
    Shape,
    Tensor,
    bfloat8_b,
    bfloat16,
    copy_host_to_device_tensor,
    dump_tensor,
    float32,
    from_device,
    from_torch,
    int32,
    load_tensor,
    to_device,
    to_torch,
    uint32,
    zeros,
)
