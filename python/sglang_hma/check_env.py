"""python -m sglang_hma.check_env: what this box can serve, and what it lacks.

Opens no card and starts no server. Exit code 0 if it can serve in some role, else 1.
"""

import argparse
import contextlib
import json
import platform
import shutil
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from hma_kernels import describe
from sglang_hma.prefill.ttnn import host
from sglang_hma.prefill.ttnn.card import stands_in, visible_cards, why_no_ttnn
from sglang_hma.seams import SGLANG_VERSION

# What they are called here, and the distributions that bring them.
PACKAGES = {
    **{name: (name,) for name in ("sglang", "sglang-router", "torch", "triton", "transformers")},
    "mooncake": tuple(f"mooncake-transfer-engine{build}" for build in ("", "-cuda13", "-non-cuda")),
    "sgl_kernel": ("sglang-kernel", "sgl-kernel"),
    "flashinfer": ("flashinfer-python",),
    "ttnn": ("ttnn",),
}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, distributions in PACKAGES.items():
        found[name] = None
        for distribution in distributions:
            with contextlib.suppress(PackageNotFoundError):
                found[name] = version(distribution)
    return found


def cpu() -> dict[str, Any]:
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "model": model,
        "cores": psutil.cpu_count(logical=True),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernels": describe(torch.device("cpu")).removeprefix("kernels: "),
    }


def gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": torch.cuda.get_device_name(index),
            "memory_gb": round(torch.cuda.get_device_properties(index).total_memory / 1e9, 1),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
        }
        for index in range(torch.cuda.device_count())
    ]


def tenstorrent() -> dict[str, Any]:
    package = find_spec("ttnn")
    folder = Path(package.origin).parent if package and package.origin else None
    return {
        "cards": visible_cards(),
        "stands_in": stands_in(),
        "driver": host.driver(),
        "firmware": host.firmware(),
        "sfpi": asdict(host.find_sfpi(folder)),
        "huge_pages": host.huge_pages(),
        "iommu": host.has_iommu(),
    }


def missing(box: dict[str, Any]) -> dict[str, list[str]]:
    """For each device: what it lacks, with the remedy; nothing if it can serve."""
    packages, card = box["packages"], box["tenstorrent"]
    common = [
        f"{name} is not installed: make venv"
        for name in ("sglang", "torch", "transformers", "mooncake")
        if packages[name] is None
    ]
    if packages["sglang"] not in (None, SGLANG_VERSION):
        common.append(f"sglang is {packages['sglang']}, needs {SGLANG_VERSION}: make venv")
    gpu = [] if box["gpus"] else ["torch sees no GPU"]
    if box["gpus"] and packages["triton"] is None:
        gpu.append("triton is not installed: make venv REQUIREMENTS=cuda")
    tt = []
    if not card["cards"] and not card["stands_in"]:
        tt.append("/dev/tenstorrent is empty: no card, or its driver (tt-kmd) is not loaded")
    if packages["ttnn"] is None:
        tt.append(why_no_ttnn())
    if (trouble := host.Sfpi(**card["sfpi"]).trouble()) is not None:
        tt.append(trouble)
    if card["cards"] and not card["iommu"] and card["huge_pages"] < len(card["cards"]):
        tt.append(
            f"{card['huge_pages']} huge pages of 1 GB and no IOMMU: the driver needs a page a card"
        )
    return {"cpu": common, "gpu": common + gpu, "tenstorrent": common + tt}


def look() -> dict[str, Any]:
    box: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": versions(),
        "cpu": cpu(),
        "gpus": gpus(),
        "tenstorrent": tenstorrent(),
        "tools": {name: shutil.which(name) for name in ("nvcc", "c++")},
    }
    return box | {"missing": missing(box)}


ROLES = {
    "cpu": "prefill and decode on the CPU",
    "gpu": "decode (or prefill) on a GPU",
    "tenstorrent": "prefill on a Tenstorrent card",
}


def show(box: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table("what", "found", title="This box")
    processor = box["cpu"]
    facts.add_row("CPU", f"{processor['model']}, {processor['cores']} cores")
    facts.add_row("memory", f"{processor['memory_gb']} GB")
    facts.add_row("CPU kernels", processor["kernels"])
    for gpu in box["gpus"] or [None]:
        facts.add_row(
            "GPU",
            f"{gpu['name']}, {gpu['memory_gb']} GB, sm_{gpu['capability']}" if gpu else "none",
        )
    card = box["tenstorrent"]
    facts.add_row("Tenstorrent cards", ", ".join(map(str, card["cards"])) or "none")
    sfpi = card["sfpi"]["version"] or ("of no known version" if card["sfpi"]["folder"] else "none")
    facts.add_row("tt-kmd, sfpi", f"{card['driver'] or 'none'}, {sfpi}")
    facts.add_row("firmware", ", ".join(card["firmware"]) or "none")
    facts.add_row(
        "huge pages of 1 GB", f"{card['huge_pages']}, {'an' if card['iommu'] else 'no'} IOMMU"
    )
    for name, found in box["packages"].items():
        facts.add_row(name, found or "not installed")
    for name, found in box["tools"].items():
        facts.add_row(name, found or "not found")
    console.print(facts)
    roles = Table("can it serve", "", "what is missing", title="Roles")
    for device, lacks in box["missing"].items():
        roles.add_row(ROLES[device], "no" if lacks else "yes", "\n".join(lacks))
    console.print(roles)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_hma.check_env",
        description="What this box can serve, and what it lacks. Opens no card.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    box = look()
    if args.json:
        print(json.dumps(box, indent=2))
    else:
        show(box)
    return 0 if any(not lacks for lacks in box["missing"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
