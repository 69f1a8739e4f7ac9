"""Real ttnn on described cards without silicon: it checks every call, makes every program and
counts the cards' memory; nothing computes.

ttnn compiles its kernels with the vendor's RISC-V compiler (sfpi), which its wheel does not have. A
card that runs nothing needs no code: in its place stands a script whose output is an empty program.
`python -m test.device.mock_card FILE.py` runs FILE.py there, with HMA_MOCK_CHIPS on so many cards.
"""

import os
import struct
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import yaml

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


BOARDS = {"blackhole": "p150", "wormhole_b0": "n150"}


def describe(chips: int, arch: str) -> dict[str, object]:
    """Cards of a chip each for ttnn where there is none, a link of four lanes between neighbours,
    the last and the first included."""
    numbers = range(chips)
    links = chips if chips > 2 else chips - 1
    return {
        "arch": dict.fromkeys(numbers, arch),
        "chips": {chip: [chip, 0, 0, 0] for chip in numbers if arch == "wormhole_b0"},
        "chip_unique_ids": {chip: 0x10000 + chip for chip in numbers},
        "ethernet_connections": [
            [{"chip": chip, "chan": 4 + lane}, {"chip": (chip + 1) % chips, "chan": 8 + lane}]
            for chip in range(links)
            for lane in range(4)
        ],
        "ethernet_connections_to_remote_devices": [],
        "chips_with_mmio": [{chip: chip} for chip in numbers],
        "harvesting": {
            chip: {
                "noc_translation": True,
                "harvest_mask": int(arch == "wormhole_b0"),
                "dram_harvesting_mask": 0,
                "eth_harvesting_mask": 0x120 if arch == "blackhole" else 0,
                "pcie_harvesting_mask": 2 if arch == "blackhole" else 0,
                "l2cpu_harvesting_mask": 0,
            }
            for chip in numbers
        },
        "boards": [
            [{"board_id": 0x41230000000 + chip}, {"board_type": BOARDS[arch]}, {"chips": [chip]}]
            for chip in numbers
        ],
        "asic_locations": dict.fromkeys(numbers, 0),
    }


def environment(folder: Path, chips: int = 1, arch: str = "blackhole") -> dict[str, str]:
    """What ttnn needs to take a description for cards; `folder` gets files."""
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
    description = folder / "cards.yaml"
    description.write_text(yaml.safe_dump(describe(chips, arch)))
    return {
        "TT_METAL_MOCK_CLUSTER_DESC_PATH": str(description),
        "TT_METAL_RUNTIME_ROOT": str(root),
        "TT_METAL_CACHE": str(folder / "kernels"),
        "TT_METAL_LOGS_PATH": str(folder / "logs"),
        "TT_LOGGER_LEVEL": "fatal",
        "LOGURU_LEVEL": "ERROR",
    }


def main() -> int:
    chips = int(os.environ.get("HMA_MOCK_CHIPS", "1"))
    with tempfile.TemporaryDirectory(prefix="hma-mock-card-") as folder:
        env = os.environ | environment(Path(folder), chips)
        return subprocess.call([sys.executable, *sys.argv[1:]], env=env)


if __name__ == "__main__":
    raise SystemExit(main())
