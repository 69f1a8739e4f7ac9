"""The wheel works where it is installed beside its dependencies, and declares what it imports."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

from sglang_hma import __version__
from sglang_hma.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"sglang_hma", "hma_kernels"}
HAS_KERNELS = find_spec("hma_kernels.cpu._ext") is not None

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` builds, from objects that the set-up compiled."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "uv", "build", "--offline", "--wheel", "--no-build-isolation"]
    command += ["--python", sys.executable, "--out-dir", str(out), str(ROOT)]
    if not HAS_KERNELS:
        command.append("--config-setting=wheel.cmake=false")
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of an environment that has the wheel and sees this one's dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A .pth in a folder named by a .pth is not read: the source tree stays out.
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(here))
    install = [sys.executable, "-m", "uv", "pip", "install", "--offline", "--no-deps"]
    install += ["--python", str(folder / "bin" / "python"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(folder / "bin" / program), *arguments]
        return subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, check=False
        )

    return run


def test_the_wheel_has_types_and_gpu_sources_but_no_cpu_sources(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    assert {"sglang_hma/py.typed", "hma_kernels/py.typed", "hma_kernels/cuda/decode.cu"} <= names
    assert not any(name.startswith(("hma_kernels/cpu/src", "test/")) for name in names)
    assert any(name.startswith("hma_kernels/cpu/_ext.") for name in names) == HAS_KERNELS


def test_the_wheel_carries_what_make_cubins_has_left(tmp_path: Path) -> None:
    """Though git ignores it. `wheel`, above, is built of a tree with or without it."""
    tree = tmp_path / "tree"
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        tree.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "python/sglang_hma", tree / "python/sglang_hma", ignore=ignored)
    shutil.copytree(ROOT / "hma_kernels", tree / "hma_kernels", ignore=ignored)
    kernel = tree / "hma_kernels/cuda/prebuilt/decode_sm90.so"
    kernel.parent.mkdir(exist_ok=True)
    kernel.write_bytes(b"machine code")
    command = [sys.executable, "-m", "uv", "build", "--offline", "--wheel", "--no-build-isolation"]
    command += ["--python", sys.executable, "--config-setting=wheel.cmake=false"]
    subprocess.run([*command, "--out-dir", str(tmp_path), str(tree)], check=True)
    (built,) = tmp_path.glob("*.whl")
    assert ZipFile(built).read("hma_kernels/cuda/prebuilt/decode_sm90.so") == b"machine code"


def test_the_command_finds_what_was_installed(run: Run) -> None:
    assert run("sglang-hma", "--version").stdout == f"sglang-hma {__version__}\n"
    found = run("sglang-hma", "check-env", "--json")
    assert found.returncode == 0, found.stderr[-2000:]
    box = json.loads(found.stdout)
    assert box["missing"]["cpu"] == []
    assert box["cpu"]["kernels"].startswith("C++") == HAS_KERNELS


def test_modules_and_entry_points_come_from_the_wheel(run: Run) -> None:
    script = """
import hma_kernels, sglang_hma, sys
from importlib.metadata import entry_points, version
from importlib.util import find_spec
kernels = find_spec("hma_kernels.cpu._ext") and __import__("hma_kernels.cpu._ext").cpu._ext
for module in filter(None, (hma_kernels, sglang_hma, kernels)):
    assert module.__file__.startswith(sys.prefix), module.__file__
for group in ("sglang.srt.platforms", "sglang.srt.plugins"):
    (point,) = entry_points(group=group, name="hma")
    assert callable(point.load())
print(version("sglang-hma"), kernels.isa() if kernels else None)
"""
    seen = run("python", "-c", script)
    assert seen.returncode == 0, seen.stderr[-2000:]
    version, isa = seen.stdout.split()
    assert version == __version__ and (isa != "None") == HAS_KERNELS


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # other tests import
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_takes(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    try:
        assert main([command, "--help"]) == 0
    except SystemExit as ended:
        assert not ended.code
    shown = capsys.readouterr().out
    assert "usage:" in shown and f"-m {COMMANDS[command][0]}" in shown


def test_a_command_is_the_main_module_of_what_it_spawns(tmp_path: Path) -> None:
    """As under `python -m`: launch_server's workers prepare torch's operators that way."""
    (tmp_path / "spawning.py").write_text("""
import multiprocessing
import sys

def say():
    print(__name__, *sys.argv[1:])

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=say)
    child.start()
    child.join()
""")
    code = "from sglang_hma import cli; cli.COMMANDS['spawn'] = ('spawning', ''); "
    code += "cli.main(['spawn', '--a-flag'])"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "__mp_main__ --a-flag\n", done.stderr


def test_no_command_and_a_wrong_one_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in ([], ["server"]):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert all(command in line for command in COMMANDS)


def test_help_names_every_command_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and module in shown for name, (module, _) in COMMANDS.items())


def imported(package: Path) -> set[str]:
    """Top-level names of what the sources of `package` import, the standard library left out."""
    names = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - OURS


def normalized(requirement: str) -> str:
    (name,) = re.findall(r"^[\w.-]+", requirement)
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_import_is_declared() -> None:
    extras = [
        name
        for extra in ("cpu", "tenstorrent", "planner")
        for name in PROJECT["optional-dependencies"][extra]
    ]
    declared = {normalized(name) for name in [*PROJECT["dependencies"], *extras]}
    providers = packages_distributions()
    needed = imported(ROOT / "python" / "sglang_hma") | imported(ROOT / "hma_kernels")
    for module in needed:
        # ttnn is not installed on every Python.
        distributions = {normalized(name) for name in providers.get(module, [module])}
        assert distributions & declared, f"{module} is imported but not declared"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_pins_name_one_version_for_each_python(python: str) -> None:
    from packaging.requirements import Requirement

    for path in (ROOT / "requirements").glob("*.txt"):
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
        pins = [Requirement(line) for line in lines if line]
        here = {"python_version": python}
        names = [pin.name for pin in pins if not pin.marker or pin.marker.evaluate(here)]
        assert len(names) == len(set(names))
        dropped = {pin.name for pin in pins} - set(names)
        assert dropped <= {"ttnn", "graphviz", "outlines", "outlines-core"}
