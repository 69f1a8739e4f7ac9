"""What a host has beside a card: the vendor's compiler, driver, firmware, huge pages.

Opens no card.
"""

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

COMPILERS = "compiler/bin/riscv*-g++"
SYSTEM_SFPI = Path("/opt/tenstorrent/sfpi")
DRIVER = Path("/sys/module/tenstorrent/version")
CLASS = Path("/sys/class/tenstorrent")
FIRMWARE = "tt_fw_bundle_ver"
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")
IOMMU = Path("/sys/class/iommu")


@dataclass(frozen=True)
class Sfpi:
    """The RISC-V compiler of a release that a ttnn is made for. folder: None if there is none;
    version: None if its compiler is missing or does not say."""

    folder: str | None
    version: str | None
    wanted: str | None

    def trouble(self) -> str | None:
        wanted = f"sfpi {self.wanted or 'of the release in the file sfpi-version of ttnn'}"
        if self.folder is None:
            return f"the vendor's compiler is missing: install {wanted} to {SYSTEM_SFPI}"
        if self.version is None:
            return f"{self.folder} has no {COMPILERS} that tells its version: install {wanted}"
        if self.wanted is not None and self.version != self.wanted:
            return f"{self.folder} is sfpi {self.version}, and ttnn is made for {self.wanted}"
        return None


def find_sfpi(ttnn: Path | None, system: Path = SYSTEM_SFPI) -> Sfpi:
    """ttnn: the package's folder. Its own compiler comes first, as for ttnn."""
    folders = [ttnn / "runtime/sfpi"] if ttnn else []
    folder = next((each for each in (*folders, system) if each.is_dir()), None)
    wanted = wanted_sfpi(ttnn / "tt_metal/sfpi-version") if ttnn else None
    if folder is None:
        return Sfpi(None, None, wanted)
    return Sfpi(str(folder), _version_of(sorted(folder.glob(COMPILERS))), wanted)


def wanted_sfpi(file: Path) -> str | None:
    if not file.is_file():
        return None
    found = re.search(r"^sfpi_version='([\d.]+)'", file.read_text(), re.MULTILINE)
    return found[1] if found else None


def _version_of(compilers: Iterable[Path]) -> str | None:
    """As the compiler's own first line has it: (tenstorrent/sfpi:7.89.0[1050])."""
    for compiler in compilers:
        try:
            done = subprocess.run(
                [str(compiler), "--version"], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        found = re.search(r"sfpi:([\d.]+\d)", done.stdout)
        if found:
            return found[1]
    return None


def driver() -> str | None:
    return DRIVER.read_text().strip() if DRIVER.exists() else None


def firmware() -> list[str]:
    """Of each card, as the driver shows it."""
    files = sorted(CLASS.glob(f"*/{FIRMWARE}")) if CLASS.is_dir() else []
    return [file.read_text().strip() for file in files]


def huge_pages() -> int:
    """Of 1 GB."""
    return int(HUGE_PAGES.read_text()) if HUGE_PAGES.exists() else 0


def has_iommu() -> bool:
    """With one the driver needs no huge pages."""
    return IOMMU.is_dir() and any(IOMMU.iterdir())
