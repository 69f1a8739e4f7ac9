"""Unpacks on a bare CUDA machine what scripts/gpu_wheels.sh has cut; needs only Python.

    python3 scripts/gpu_unpack.py PIECES INTO [--groups GROUP ...]

INTO gets site, with what belongs on PYTHONPATH, cuda, which stands before it for a GPU's server,
and lib, for LD_LIBRARY_PATH. A group with a piece that is missing or damaged is left out whole, in
one line. Wheels that lie in PIECES and PIECES/cuda and libraries in PIECES/lib are taken too. torch
and Triton are always the machine's own. Exit code 1 if something was left out.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
import tarfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath

OWN = {"torch", "triton"}


def sums_of(pieces: Path) -> dict[str, dict[str, str]]:
    """SHA256 by file name, by group; both in order."""
    found: dict[str, dict[str, str]] = {}
    listed = pieces / "SHA256SUMS"
    for line in listed.read_text().splitlines() if listed.exists() else ():
        digest, name = line.split()
        found.setdefault(name.partition(".tar.")[0], {})[name] = digest
    return found


def join(pieces: Path, sums: dict[str, str], into: Path) -> None:
    """The files of a group's tar file. Raises ValueError that names the first bad piece."""
    whole = into.with_suffix(".tar")
    try:
        with whole.open("wb") as target:
            for name, digest in sums.items():
                path = pieces / name
                if not path.exists():
                    raise ValueError(f"{name} is missing")
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest() != digest:
                    raise ValueError(f"{name} is damaged: its SHA256 is another")
                target.write(data)
        with tarfile.open(whole) as tar:
            tar.extractall(into, filter="data")
    finally:
        whole.unlink()


def unpack(wheel: Path, into: Path) -> None:
    """What an installer would put into site-packages; scripts and data files are not needed."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            parts = PurePosixPath(member.filename).parts
            if parts[0].endswith(".data"):
                if len(parts) < 3 or parts[1] not in ("purelib", "platlib"):
                    continue
                parts = parts[2:]
            if ".." in parts or member.is_dir():
                continue
            target = into.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)


def distribution(wheel: Path) -> str:
    return re.sub(r"[-_.]+", "-", wheel.name.partition("-")[0]).lower()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pieces", type=Path)
    parser.add_argument("into", type=Path)
    parser.add_argument("--groups", nargs="*")
    args = parser.parse_args()
    for name in ("site", "cuda", "lib"):
        (args.into / name).mkdir(parents=True, exist_ok=True)
    carried, bad = [args.pieces], 0
    for group, sums in sums_of(args.pieces).items():
        if args.groups and group not in args.groups:
            continue
        folder = args.into / group
        try:
            join(args.pieces, sums, folder)
            carried.append(folder)
        except (ValueError, OSError, tarfile.TarError) as error:
            print(f"{group}: left out: {error}")
            bad += 1
    jobs = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for folder in carried:
            wheels = [(path, "site") for path in folder.glob("*.whl")]
            wheels += [(path, "cuda") for path in folder.glob("cuda/*.whl")]
            for path, place in wheels:
                if distribution(path) in OWN:
                    print(f"{path.name}: left out: the machine's own is used")
                else:
                    jobs.append((path, pool.submit(unpack, path, args.into / place)))
            for path in folder.glob("lib/*"):
                shutil.copy(path, args.into / "lib")
            print(f"{folder.name}: {len(wheels)} wheels") if wheels else None
        for path, job in jobs:
            try:
                job.result()
            except (OSError, zipfile.BadZipFile) as error:
                print(f"{path.name}: left out: {error}")
                bad += 1
    for folder in carried[1:]:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
