"""Every hook and override takes hold in a fresh process, is noticed when it does not, and is
documented."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_hma import cluster_secret, overrides
from test.launch.test_models import PLAIN
from test.warm_python import WarmPython

ROOT = Path(__file__).parent.parent

# Arguments: a flag that is refused, then those of a server that would start.
SCRIPT = """
import contextlib, io, json, pkgutil, sys
from sglang_hma import launch_server, overrides, seam_list, seams
from sglang_hma.launch import arguments, environment

_, refused, *flags = sys.argv
config = arguments.assume(flags)
environment.prepare(config)  # a refusal comes before it, and this process goes on


def launch(*more):
    # Exit code, and what stood on stderr.
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        try:
            launch_server.main([*flags, *more])
        except SystemExit as stop:
            return stop.code, out.getvalue()


def refusal(case):
    try:
        seams.verify(config)
    except RuntimeError as error:
        assert "\\n" not in str(error), error
        return str(error)
    raise AssertionError(f"{case}, and nobody noticed")


found = {"refused": launch(refused)}
targets = [seam.target for seam in seam_list.SEAMS if seam.applies(config)]
originals = {target: pkgutil.resolve_name(target) for target in targets}
found["sglang's own"] = launch("--served-model-name", "a:b")
seams.verify(config)

# Hooks that did not take hold, each in turn.
for target, original in originals.items():
    owner, _, name = target.rpartition(".")
    owner, ours = pkgutil.resolve_name(owner), pkgutil.resolve_name(target)
    setattr(owner, name, original)
    assert target in refusal(f"{target} was lost")
    setattr(owner, name, ours)
if config.packs_kv:
    from sglang.srt.arg_groups import resolution_hooks

    ours = resolution_hooks._HOOKS.pop("handle_model_specific_adjustments")
    assert "resolution_hooks" in refusal("the hook into a step of SGLang's arguments was lost")
    resolution_hooks._HOOKS["handle_model_specific_adjustments"] = ours
seams.verify(config)


# SGLang with a method less, and with one that is called otherwise, each override in turn.
def changed(self, a_new_argument):
    ...


count = 0
for cls in overrides.classes():
    for name, ours in overrides.marked(cls):
        place = f"{cls.__module__}.{cls.__qualname__}.{name}"
        theirs = {base: vars(base)[name] for base in overrides.sglang_bases(cls)
                  if name in vars(base)}
        for base in theirs:
            delattr(base, name)
        assert f"{place}: " in (said := refusal(place)) and "no such method" in said, said
        for base in theirs:
            setattr(base, name, changed)
        if overrides.mismatch(changed, ours):
            assert f"{place}: " in (said := refusal(place)) and "a_new_argument" in said, said
        for base, original in theirs.items():
            setattr(base, name, original)
        count += 1
seams.verify(config)

# Whatever hides a method of SGLang's says so.
for cls in overrides.classes():
    of_sglang = {name for base in overrides.sglang_bases(cls) for name in vars(base)}
    marked = {name for name, _ in overrides.marked(cls)}
    hidden = {name for name, value in vars(cls).items() if callable(value)} & of_sglang - marked
    assert not hidden, f"{cls.__qualname__} overrides {hidden} without a mark"

from sglang.srt.platforms.interface import SRTPlatform
SRTPlatform.post_load = SRTPlatform.post_load_model
del SRTPlatform.post_load_model
found["renamed"] = launch()
print(json.dumps(found | {"hooks": len(targets), "overrides": count}))
"""

BEGIN = "sglang_hma.launch_server: error: "


@pytest.mark.parametrize(
    ("refused", "argv", "hooks"),
    [
        ("--enable-mixed", ["--disaggregation-mode", "decode", "--hma-cluster-secret-file"], 37),
        ("--page-size=1", ["--disaggregation-mode", "prefill", "--hma-kv-format", "native"], 27),
    ],
)
def test_losses_are_noticed(
    python: WarmPython, refused: str, argv: list[str], hooks: int, tmp_path: Path
) -> None:
    """Hooks that did not take hold, methods that SGLang has lost or calls otherwise; the launcher
    says it in one line, as it does of flags that it or SGLang refuses."""
    (tmp_path / "config.json").write_text(json.dumps(PLAIN))
    cluster_secret.make(tmp_path / "secret")
    if argv[-1] == "--hma-cluster-secret-file":
        argv = [*argv, str(tmp_path / "secret")]
    done = python("-c", SCRIPT, refused, "--model-path", str(tmp_path), "--device", "cpu", *argv)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["hooks"] == hooks and found["overrides"] > 20
    for case, words in {
        "refused": [refused.partition("=")[0], " does not go with --hma-"],
        "sglang's own": ["SGLang refuses its arguments: served_model_name", "a:b"],
        "renamed": ["HmaPlatformMixin.post_load_model: sglang.", "has no such method"],
    }.items():
        code, text = found[case]
        *_, last = lines = text.splitlines()
        assert code == 2 and last.startswith(BEGIN), text
        assert all(word in last for word in words), last
        if case == "refused":
            assert lines == [last]


class Base:
    def plain(self, batch: object, size: int = 1) -> None: ...
    def named(self, *, batch: object, size: int = 1) -> None: ...
    def rest(self, batch: object, *args: object, **kwargs: object) -> None: ...

    quantity = 3


@pytest.mark.parametrize(
    ("name", "ours", "why"),
    [
        ("plain", lambda self, batch, size=1: None, None),
        ("plain", lambda self, batch, size=2, more=3: None, None),
        ("plain", lambda self, *args, **kwargs: None, None),
        ("plain", lambda self, batch, *args, **kwargs: None, None),
        ("plain", lambda self, batch: None, "takes size by position"),
        ("plain", lambda self, batch, **kwargs: None, "takes size by position"),
        ("plain", lambda self, batch, *args: None, "takes size by name"),
        ("plain", lambda self, size, batch: None, "has batch where ours has size"),
        ("plain", lambda self, requests, size=1: None, "has batch where ours has requests"),
        ("plain", lambda self, batch, size: None, "lets size be left out"),
        ("plain", lambda self, batch, size=1, *, more: None, "has no more"),
        ("named", lambda self, *, size=1, batch: None, None),
        ("named", lambda self, *, size=1, **kwargs: None, None),
        ("named", lambda self, batch, size=1: None, None),
        ("named", lambda self, *, batch: None, "takes size by name"),
        ("named", lambda self, *, batch, size: None, "lets size be left out"),
        ("rest", lambda self, batch, *args, **kwargs: None, None),
        ("rest", lambda self, batch, *args, of_kwargs, **kwargs: None, None),
        ("rest", lambda self, batch, *args: None, "takes **kwargs"),
        ("rest", lambda self, batch, **kwargs: None, "takes *args"),
        ("quantity", lambda self: None, "is a int, not a method"),
    ],
)
def test_signatures(name: str, ours: Callable[..., None], why: str | None) -> None:
    reason = overrides.mismatch(vars(Base)[name], ours)
    assert reason == why or (why is not None and why in str(reason))
    # By itself, too: a call that the base takes, in each way of giving its arguments.
    if why is None:
        base = inspect.signature(vars(Base)[name])
        for args, kwargs in (((1, 2), {}), ((1,), {"size": 2}), ((), {"batch": 1, "size": 2})):
            try:
                base.bind(None, *args, **kwargs)
            except TypeError:
                continue
            given = kwargs | ({"of_kwargs": 1} if name == "rest" else {})
            inspect.signature(ours).bind(None, *args, **given)


def test_the_document_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "seams_doc.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plain_sglang_is_left_alone() -> None:
    """Without our launcher both entry points do nothing."""
    code = "import sglang_hma; print(sglang_hma.activate(), sglang_hma.register())"
    env = {k: v for k, v in os.environ.items() if k != "SGLANG_HMA_CONFIG"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["None", "None"]
