"""Environment variables of a server's processes, set before SGLang and Mooncake read them."""

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sglang_hma.config import ARCHITECTURES_ENV, SHARE_ENV, HmaConfig
from sglang_hma.launch import run_folder
from sglang_hma.launch.addresses import HOST_IP
from sglang_hma.launch.guardian import RUN_ID_ENV


@dataclass(frozen=True)
class Variable:
    """What is set where `applies`; what the user has set stays, unless it is `forced`."""

    name: str
    value: str
    why: str
    applies: Callable[[HmaConfig], bool] = lambda _: True
    when: str = ""
    forced: bool = False
    early: bool = False  # before torch, so before `applies` could be asked


def _on_cpu(config: HmaConfig) -> bool:
    return config.device == "cpu"


VARIABLES = (
    Variable(
        "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX",
        "0",
        "that path records a CUDA event; ours sends cached pages before the forward pass itself",
        _on_cpu,
        "on CPU",
        forced=True,
    ),
    Variable(
        "CUDA_VISIBLE_DEVICES",
        "",
        "a server on the CPU leaves its host's GPUs alone; SGLang would use what it sees",
        _on_cpu,
        "on CPU",
        forced=True,
    ),
    Variable(
        "OMP_WAIT_POLICY",
        "PASSIVE",
        "SGLang's servers on one box poll and compute in turns: threads that wait give up the core",
        early=True,
    ),
    Variable(
        "OPENBLAS_NUM_THREADS",
        "1",
        "numpy's BLAS would start threads, and a process with threads cannot be forked",
        early=True,
    ),
    Variable(
        "JE_ARROW_MALLOC_CONF",
        "background_thread:false",
        "pyarrow's allocator would start a thread; transformers imports it where scikit-learn is "
        "installed",
        early=True,
    ),
    Variable(
        "SGLANG_EXTERNAL_MODEL_PACKAGE",
        "sglang_hma.served_model",
        "SGLang imports the module of the served model, not all two hundred of its models",
    ),
    Variable(
        "SGLANG_HTTP_SERVER_APP_PATH",
        "sglang_hma.launch.http_app:app",
        "with --tokenizer-worker-num each worker imports the HTTP application: ours tells busy "
        "from dead",
    ),
    Variable(
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH",
        "0",
        "a server whose process died would wait a minute for a core dump that nobody writes",
    ),
    Variable(
        "SGLANG_PYSPY_DUMP_BEFORE_CRASH",
        "0",
        "and 5 s before py-spy, whether that is installed or not",
    ),
    # The router keeps idle connections for up to 90 s, cloud load balancers for up to 600.
    Variable(
        "SGLANG_TIMEOUT_KEEP_ALIVE",
        "620",
        "SGLang's 5 s lets a server close an idle connection on which the router has just sent a "
        "request: that half of the request is lost, and the router waits for the other half (seen "
        "about once in 500 requests at 200 concurrent); so the client must be the first to close",
    ),
    Variable("MC_TCP_SLICE_SIZE", "1048576", "larger slices make TCP writes faster"),
    Variable(
        "MC_TE_METADATA_REFRESH_INTERVAL_SECONDS",
        "1",
        "a peer that restarts on the same port is found again",
    ),
    Variable(
        "MC_TCP_PROGRESS_TIMEOUT_SEC",
        "20",
        "a write that makes no progress ends, with its connection closed, before SGLang would drop "
        "the peer",
    ),
    Variable(
        "MC_TRANSFER_TIMEOUT", "60", "a write to a stopped peer ends before SGLang gives it up"
    ),
    Variable("MC_LOG_LEVEL", "WARNING", "Mooncake's own lines, one a connection, are left out"),
    Variable(
        "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S",
        "1",
        "a decode server that was out of reach is tried again after a second",
    ),
    Variable(
        "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S", "10", "and then at least every ten seconds"
    ),
    Variable(
        "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT",
        "1e9",
        "SGLang's 30 s would free pages that a stopped prefill server may still write to; decode "
        "keeps them until nothing can be written to them, however long that takes",
        forced=True,
    ),
)


# Modules that warn, wherever they are imported, of what does not concern a CPU server.
NOISY = (
    "sglang.srt.layers.quantization.awq.awq",
    "sglang.srt.layers.quantization.gguf",
    "sglang.kernels.ops.attention.fla.utils",
)

# A folder that lives as long as this process.
_metrics: tempfile.TemporaryDirectory[str] | None = None


RANKS_INTERFACE = "GLOO_SOCKET_IFNAME"


def prepare_early() -> None:
    """Before torch is imported."""
    for variable in VARIABLES:
        if variable.early:
            os.environ.setdefault(variable.name, variable.value)


def prepare(config: HmaConfig, *, metrics: bool = False, compiles: bool = False) -> None:
    """Before SGLang is imported; `metrics`, `compiles`: SGLang's --enable-metrics and
    --enable-torch-compile."""
    os.environ.update(config.environment())
    for variable in VARIABLES:
        if variable.applies(config):
            if variable.forced:
                os.environ[variable.name] = variable.value
            else:
                os.environ.setdefault(variable.name, variable.value)
    if config.bind:
        # SGLang's control socket is bound to it; peers are told it, for Mooncake's ports too.
        os.environ[HOST_IP] = config.bind
    if metrics:
        share_metrics()
    if (config.device == "cpu" or config.torch_ops) and not compiles:
        # Functions marked for torch.compile stay as they are. The compiler would be imported
        # for them, and the sharded embedding's one compiled, which takes a minute.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if config.device == "cpu":
        silence()


def share_metrics() -> None:
    """prometheus_client decides when it is imported whether processes share their metrics."""
    global _metrics
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        # Of a run of launch_pd, in its folder: who is killed removes nothing.
        run_id = os.environ.get(RUN_ID_ENV)
        folder = run_folder.path(run_id) if run_id else None
        if folder is not None and not folder.is_dir():
            folder = None
        _metrics = tempfile.TemporaryDirectory(prefix="sglang-hma-metrics-", dir=folder)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = _metrics.name


def silence() -> None:
    """Ignore the warnings of NOISY modules, here and in processes that are spawned."""
    quiet = [f"ignore::UserWarning:{module}" for module in NOISY]
    given = [text for text in (os.environ.get("PYTHONWARNINGS"),) if text]
    os.environ["PYTHONWARNINGS"] = ",".join([*quiet, *given])
    for module in NOISY:
        whole = rf"{re.escape(module)}\Z"
        warnings.filterwarnings("ignore", category=UserWarning, module=whole)


def serve_models(models: Iterable[Any]) -> None:
    """Tell sglang_hma.served_model what SGLang is about to look for there."""
    names = {name: None for model in models for name in model.hf_config.architectures or ()}
    os.environ[ARCHITECTURES_ENV] = ",".join(names)


def keep_ranks_inside(server_args: Any) -> None:
    """The ranks of a server on one host speak over loopback; gloo would listen on the address of
    the host's name."""
    if server_args.nnodes == 1:
        os.environ.setdefault(RANKS_INTERFACE, "lo")


def share_cores(server_args: Any) -> None:
    """Threads for each tensor-parallel rank of each CPU server on this box."""
    servers, ranks = max(1, int(os.environ.get(SHARE_ENV, "1"))), server_args.tp_size
    cores = sorted(os.sched_getaffinity(0))
    if servers * ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(cores) // (servers * ranks))))
    if ranks == 1:
        return
    if ranks > len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))):
        # SGLang gives each rank a NUMA node, and refuses to start with more ranks than nodes.
        starts = [len(cores) * rank // ranks for rank in range(ranks + 1)]
        shares = [cores[a : max(a + 1, b)] for a, b in pairwise(starts)]
        bind = "|".join(",".join(map(str, share)) for share in shares)
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", bind)
