"""Real ttnn on a described card without silicon: it checks every call, makes every program and
counts the card's memory; nothing computes.

ttnn compiles its kernels with the vendor's RISC-V compiler (sfpi), which its wheel does not have. A
card that runs nothing needs no code: in its place stands a script whose output is an empty program.
`python -m test.device.mock_card FILE.py` runs FILE.py there.
"""

import os
import struct
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

CARD = Path(__file__).parents[1] / "data" / "blackhole_card.yaml"

COMPILER = """\
#!/bin/sh
case "$1" in --version) echo "riscv-tt-elf-g++ 15.1.0"; exit;; esac
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out=$2; shift;;
    -MF) dependencies=$2; shift;;
    *.cc | *.cpp) source=$1;;
  esac
  shift
done
[ -z "$dependencies" ] || echo "$out: $source" > "$dependencies"
cp "${0%/*}/empty.elf" "$out"
"""

ENTRY = 0x3840


def empty_program() -> bytes:
    """ELF32 for RISC-V: four no-operations, a symbol table and an empty relocation section."""
    names = b"\0.text\0.symtab\0.strtab\0.rela.text\0.shstrtab\0"
    text, symbols, strings = struct.pack("<I", 0x13) * 4, bytes(16), bytes(4)
    offsets, blob = [], b""
    for part in (text, symbols, strings, names):
        offsets.append((52 + 32 + len(blob), len(part)))
        blob += part + bytes(-len(part) % 4)
    table = 52 + 32 + len(blob)

    def section(name: str, *fields: int) -> bytes:
        return struct.pack("<10I", names.index(b"\0" + name.encode() + b"\0") + 1, *fields)

    sections = [
        bytes(40),
        section(".text", 1, 6, ENTRY, *offsets[0], 0, 0, 4, 0),
        section(".symtab", 2, 0, 0, *offsets[1], 3, 1, 4, 16),
        section(".strtab", 3, 0, 0, *offsets[2], 0, 0, 1, 0),
        section(".rela.text", 4, 0x40, 0, table, 0, 2, 1, 4, 12),
        section(".shstrtab", 3, 0, 0, *offsets[3], 0, 0, 1, 0),
    ]
    header = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9)
    header += struct.pack("<HHIIIIIHHHHHH", 2, 243, 1, ENTRY, 52, table, 0, 52, 32, 1, 40, 6, 5)
    load = struct.pack("<8I", 1, offsets[0][0], ENTRY, ENTRY, len(text), len(text), 5, 4)
    return header + load + blob + b"".join(sections)


def environment(folder: Path) -> dict[str, str]:
    """What ttnn needs to take the description for a card; `folder` gets files."""
    spec = find_spec("ttnn")
    assert spec is not None and spec.origin is not None
    package, root = Path(spec.origin).parent, folder / "ttnn"
    bin_folder = root / "runtime" / "sfpi" / "compiler" / "bin"
    bin_folder.mkdir(parents=True)
    for entry in package.iterdir():
        if entry.name != "runtime":
            (root / entry.name).symlink_to(entry)
    (root / "runtime" / "hw").symlink_to(package / "runtime" / "hw")
    compiler = bin_folder / "riscv-tt-elf-g++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    (bin_folder / "empty.elf").write_bytes(empty_program())
    return {
        "TT_METAL_MOCK_CLUSTER_DESC_PATH": str(CARD),
        "TT_METAL_RUNTIME_ROOT": str(root),
        "TT_METAL_CACHE": str(folder / "kernels"),
        "TT_METAL_LOGS_PATH": str(folder / "logs"),
        "TT_LOGGER_LEVEL": "fatal",
        "LOGURU_LEVEL": "ERROR",
    }


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="hma-mock-card-") as folder:
        env = os.environ | environment(Path(folder))
        return subprocess.call([sys.executable, *sys.argv[1:]], env=env)


if __name__ == "__main__":
    raise SystemExit(main())
