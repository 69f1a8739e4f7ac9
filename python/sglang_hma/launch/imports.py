"""What a server does around its imports of torch and SGLang, which are most of its start."""

import contextlib
import gc
import os
import tempfile
import warnings
from collections.abc import Iterator

# Modules that warn, wherever they are imported, of what a CPU server cannot and need not do.
OTHER_DEVICES = (
    "sglang.srt.layers.quantization.awq.awq",
    "sglang.srt.layers.quantization.gguf",
    "sglang.kernels.ops.attention.fla.utils",
)

# The folder lives as long as this process.
_metrics: tempfile.TemporaryDirectory[str] | None = None


def before_torch(argv: list[str]) -> None:
    """Set what libraries read while they are imported, in this process and those it starts."""
    # Threads that yield the cores: servers on one box poll and compute in turns.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # numpy's BLAS would start threads, and a process with threads is not forked.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", "sglang_hma.served_model")
    given = tuple(arg.partition("=")[0] for arg in argv)
    if "--enable-metrics" in given:
        share_metrics()


def share_metrics() -> None:
    """prometheus_client decides when it is imported whether processes share their metrics."""
    global _metrics
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        _metrics = tempfile.TemporaryDirectory(prefix="sglang-hma-metrics-")
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = _metrics.name


def for_cpu(argv: list[str]) -> None:
    """What SGLang need not import, and need not say, on a CPU."""
    # Functions marked for torch.compile stay as they are. Otherwise the compiler is imported for
    # them, and the sharded embedding's is compiled, which takes a minute.
    if not any(arg.startswith(("--enable-torch-compile", "--config")) for arg in argv):
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    quiet = [f"ignore::UserWarning:{module}" for module in OTHER_DEVICES]
    given = filter(None, [os.environ.get("PYTHONWARNINGS")])
    os.environ["PYTHONWARNINGS"] = ",".join([*quiet, *given])
    for module in OTHER_DEVICES:
        warnings.filterwarnings("ignore", category=UserWarning, module=module.replace(".", r"\."))


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Without garbage collections, which would go through a million objects and find little."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
