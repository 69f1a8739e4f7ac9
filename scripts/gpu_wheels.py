"""scripts/gpu_wheels.sh says what this does."""

import argparse
import ctypes.util
import hashlib
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PYTHON = "3.12"  # the machine's
PIECE_BYTES = 58_000_000
GLIBCS = (39, 38, 36, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)  # minor versions that wheels name
MOONCAKE_CUDA = "mooncake-transfer-engine-cuda13"
CHECKS = {
    *("flashinfer-python", "apache-tvm-ffi", "einops", "ninja", "tabulate", "nvidia-ml-py"),
    *("nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base"),
    *("nvidia-cutlass-dsl-libs-core", "nvidia-cutlass-dsl-libs-cu13"),
    *("xxhash", "rich", "markdown-it-py", "mdurl", "pygments"),
    *("matplotlib", "contourpy", "cycler", "fonttools", "kiwisolver", "pyparsing", "pillow"),
    *("python-dateutil", "six"),
}
# Not carried, though the machine lacks them.
LEFT_OUT = {
    **dict.fromkeys(("torchaudio", "torchcodec"), "made for another torch"),
    **dict.fromkeys(
        ("nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-cuda-nvcc", "nvidia-nvvm"),
        "the machine has nvcc",
    ),
    "nvidia-cutlass-dsl-libs-cu12": "for CUDA 12",
    **dict.fromkeys(("aiconfigurator-core", "narwhals", "plotly", "simpy"), "the planner's"),
    "ttnn": "for Tenstorrent cards",
}
# What Mooncake links to. Each host has libc's own.
LIBRARIES = ("numa", "ibverbs", "mlx5", "curl", "nl-3", "nl-route-3")


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(list_name: str) -> dict[str, str]:
    """Requirement by name, of requirements/`list_name`.txt."""
    found = {}
    for line in (ROOT / "requirements" / f"{list_name}.txt").read_text().splitlines():
        if text := line.partition("#")[0].strip():
            pin = Requirement(text)
            if pin.marker is None or pin.marker.evaluate({"python_version": PYTHON}):
                found[normalized(pin.name)] = f"{pin.name}{pin.specifier}"
    return found


def versions_of(machine: Path) -> dict[str, str]:
    """By name; "" where the file says none."""
    lines = (line.partition("#")[0].strip() for line in machine.read_text().splitlines())
    found = (re.split("==| @ ", line, maxsplit=1) for line in lines if line)
    return {normalized(name): "".join(version) for name, *version in found}


def other_torch(has: str) -> str | None:
    """Why sgl_kernel cannot run with this torch: it is linked to one version's C++ symbols."""
    pinned = pins("cuda")
    made_for = pinned["torch"].removeprefix("torch==")
    if has.partition("+")[0] == made_for:
        return None
    return f"{pinned['sglang-kernel']} is made for torch {made_for}; the machine has {has}"


def torchvision_for(torch: str) -> str:
    """Each torch has one: 0.15 is of 2.0, 0.16 of 2.1 and so on."""
    minor = int(torch.split(".")[1])
    return f"torchvision==0.{minor + 15}.*"


def groups(machine: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Requirements by group and name, for a machine that has these versions by name."""
    cpu, cuda = pins("cpu"), pins("cuda")
    cpu["torchvision"] = torchvision_for(machine["torch"])
    wanted = {
        name: pin
        for name, pin in (pins("dev") | cuda | cpu).items()
        if name not in machine.keys() | LEFT_OUT.keys()
    }
    sets = {
        "servers": set(cpu) & set(wanted),
        "mooncake-cuda": {MOONCAKE_CUDA},
        "kernel-checks": CHECKS & set(wanted),
        "sgl-kernel": set(cuda) & set(wanted) - set(cpu) - CHECKS - {MOONCAKE_CUDA},
    }
    return {group: {name: wanted[name] for name in sorted(names)} for group, names in sets.items()}


def download(pin: str, into: Path) -> Path:
    """The wheel for the machine's Python. Raises RuntimeError with pip's reason."""
    into.mkdir(parents=True, exist_ok=True)
    name, _, version = pin.partition("==")
    stem = f"{re.sub('[-_.]+', '_', name).lower()}-{version}-"
    there = [path for path in into.glob("*.whl") if fnmatch(path.name.lower(), f"{stem}*")]
    if there:
        return there[0]
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBCS]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(into)]
    command += ["--only-binary=:all:", "--python-version", PYTHON, *platforms, pin]
    before = set(into.glob("*.whl"))
    done = subprocess.run(command, capture_output=True, text=True)
    new = set(into.glob("*.whl")) - before
    if done.returncode or len(new) != 1:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError((reasons or ["pip gave no reason"])[-1].removeprefix("ERROR: "))
    return new.pop()


def own_wheel(into: Path) -> Path:
    """With the C++ kernels, and what make cubins has left."""
    options = ["--wheel", "--quiet", "--out-dir", str(into)]
    if "{}.{}".format(*sys.version_info) == PYTHON:
        options += ["--no-build-isolation", "--python", sys.executable]
    else:
        options += ["--python", PYTHON]
    for old in into.glob("sglang_hma-*.whl"):
        old.unlink()
    done = subprocess.run([sys.executable, "-m", "uv", "build", *options, str(ROOT)], text=True)
    built = list(into.glob("sglang_hma-*.whl"))
    if done.returncode or not built:
        raise RuntimeError("it could not be built")
    return built[0]


def system_libraries() -> Iterator[Path]:
    """Files of LIBRARIES on this host, by the names that programs look for."""
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
    for name in LIBRARIES:
        soname = ctypes.util.find_library(name)
        match = (
            re.search(rf"^\s*{re.escape(soname)} .*x86-64.* => (.*)$", listed, re.M)
            if soname
            else None
        )
        if match:
            yield Path(match[1])
        else:
            print(f"left out: lib{name}: not on this host; used where the machine has it")


def write_pieces(
    group: str, members: Iterable[tuple[Path, str]], out: Path, size: int
) -> list[Path]:
    """A tar file of (path, name in it), cut into GROUP.tar.00, GROUP.tar.01 and so on."""
    whole = out / f"{group}.tar"
    with tarfile.open(whole, "w") as tar:
        for path, name in members:
            tar.add(path.resolve(), name)
    pieces = []
    with whole.open("rb") as source:
        while data := source.read(size):
            pieces.append(out / f"{whole.name}.{len(pieces):02}")
            pieces[-1].write_bytes(data)
    whole.unlink()
    return pieces


def collect(group: str, wanted: dict[str, str], cache: Path) -> list[tuple[Path, str]]:
    """Files with their places in the tar file: wheels, cuda/, lib/, as gpu_unpack.py wants them."""
    folder = "cuda/" if group == "mooncake-cuda" else ""
    members = []
    for pin in wanted.values():
        try:
            path = download(pin, cache)
        except RuntimeError as error:
            print(f"left out: {pin}: {error}", flush=True)
        else:
            members.append((path, f"{folder}{path.name}"))
    if group == "servers":
        try:
            path = own_wheel(cache)
            members.append((path, path.name))
        except RuntimeError as error:
            print(f"left out: sglang-hma's own wheel: {error}; attention on the CPU will be slow")
        members += [(path, f"lib/{path.name}") for path in system_libraries()]
    return members


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--groups", nargs="+", metavar="GROUP", help="default: all")
    machine = ROOT / "scripts/gpu_machine.txt"
    parser.add_argument(
        "--machine", type=Path, default=machine, help="names that it has, a line each"
    )
    args = parser.parse_args()
    has = versions_of(args.machine)
    if not re.match(r"2\.\d+", has.get("torch", "")):
        parser.error(f"{args.machine} has no line torch==VERSION, which wheels depend on")
    known = groups(has)
    if others := set(args.groups or ()) - set(known):
        parser.error(f"--groups {' '.join(sorted(others))}: needs some of {' '.join(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("*.tar.*"):
        old.unlink()
    sums = []
    for group, wanted in known.items():
        if args.groups and group not in args.groups:
            continue
        if group == "sgl-kernel" and (reason := other_torch(has["torch"])):
            print(f"left out: {group}: {reason}")
            continue
        members = collect(group, wanted, ROOT / "build/gpu_wheels")
        pieces = write_pieces(group, members, args.out, PIECE_BYTES)
        sums += [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}" for p in pieces]
        megabytes = sum(piece.stat().st_size for piece in pieces) / 1e6
        print(
            f"{group}: {len(members)} files, {megabytes:.0f} MB in {len(pieces)} pieces", flush=True
        )
    (args.out / "SHA256SUMS").write_text("".join(f"{line}\n" for line in sums))
    for name, reason in LEFT_OUT.items():
        print(f"left out: {name}: {reason}")


if __name__ == "__main__":
    main()
