"""What makes a CPU server's start short. Each in a process of its own: all is global state."""

import os
import subprocess
import sys
import textwrap

import pytest


def python(*code: str, **environment: str) -> str:
    """What `code` prints, its parts one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(map(textwrap.dedent, code))],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
    import multiprocessing, os, threading
    from types import SimpleNamespace
    import torch
    from sglang_hma import processes

    def sglangs_own(server_args):
        multiprocessing.set_start_method("spawn", force=True)

    def start_method(**sizes):
        sizes = dict(tp_size=1, pp_size=1, dp_size=1) | sizes
        processes.set_envs_and_config(sglangs_own, SimpleNamespace(**sizes))
        return multiprocessing.get_start_method()
"""


def test_alone_and_without_threads_it_forks() -> None:
    # OMP_NUM_THREADS is known after torch is imported, when libgomp no longer looks at it.
    code = """
        os.environ["OMP_NUM_THREADS"] = "3,1"
        print(start_method())
        multiprocessing.Process(target=lambda: print(torch.get_num_threads(), flush=True)).start()
    """
    printed = python(FORK, code, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1").split()
    assert printed == ["fork", "3"]


def test_ranks_and_threads_are_spawned() -> None:
    code = """
        print(start_method(tp_size=2), start_method(pp_size=2), start_method(dp_size=2))
        stop = threading.Event()
        threading.Thread(target=stop.wait).start()
        print(start_method())
        stop.set()
    """
    assert python(FORK, code, OPENBLAS_NUM_THREADS="1").split() == ["spawn"] * 4


def test_forked_process_publishes_metrics() -> None:
    code = """
        import multiprocessing
        from sglang_hma.launch import environment
        environment.share_metrics()
        from prometheus_client import CollectorRegistry, Counter, multiprocess
        counter = Counter("answers", "of a forked process")
        child = multiprocessing.get_context("fork").Process(target=lambda: counter.inc(7))
        child.start()
        child.join()
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        print(registry.get_sample_value("answers_total"))
    """
    environment = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
    assert python(code, **environment).strip() == "7.0"


WARN = """
    import warnings
    for module in ("sglang.srt.layers.quantization.gguf", "sglang.srt.layers.quantization.ggufx"):
        warnings.warn_explicit(f"from {module}.", UserWarning, "file.py", 1, module)
"""


def test_noise_is_ignored_here_and_in_spawned_processes() -> None:
    code = """
        import os, subprocess, sys
        from sglang_hma.launch import environment
        environment.silence()
    """
    spawn = f"subprocess.run([sys.executable, '-c', {textwrap.dedent(WARN)!r}], stderr=1)"
    printed = python(code, spawn, "sys.stderr = sys.stdout", WARN)
    assert printed.count("from sglang.srt.layers.quantization.ggufx.") == 2
    assert "from sglang.srt.layers.quantization.gguf." not in printed


@pytest.mark.slow
def test_served_model_is_sglangs_own_and_others_are_found_too() -> None:
    code = """
        import sys
        from sglang.srt.models.registry import ModelRegistry
        model, _ = ModelRegistry.resolve_model_cls(["Qwen3ForCausalLM"])
        print(model.__module__, "sglang.srt.models.gpt2" in sys.modules)

        from sglang_hma.served_model.entry import classes_of
        assert classes_of({"Nobodys"}) == []
        supported = set(ModelRegistry.get_supported_archs())
        found = {model.__name__: model for model in classes_of(supported)}
        same = {name: found[name] for name in supported} == ModelRegistry.models
        print(len(supported) > 100, same)
    """
    printed = python(
        code,
        SGLANG_EXTERNAL_MODEL_PACKAGE="sglang_hma.served_model",
        SGLANG_HMA_ARCHITECTURES="Qwen3ForCausalLM",
    )
    lines = printed.splitlines()
    assert lines[-2:] == ["sglang.srt.models.qwen3 False", "True True"]
