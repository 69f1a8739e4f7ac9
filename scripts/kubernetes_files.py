"""Write deploy/kubernetes from the manifests that `planner deploy` prints.

    python scripts/kubernetes_files.py            write it
    python scripts/kubernetes_files.py --check    exit code 1 if it is stale

The base has no devices; an overlay is the difference between what is below it and a fleet on its
hardware, as JSON patches for kustomize.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_hma import __version__
from sglang_hma.planner.deployment import BACKENDS, Plan, of_pair, router
from sglang_hma.planner.kubernetes.cluster import COMPONENT, Cluster, Manifest
from sglang_hma.planner.kubernetes.fleet import (
    POD_IP,
    Devices,
    Fleet,
    finds_pods,
    fleet_of,
    router_waits,
)
from sglang_hma.planner.kubernetes.manifests import as_yaml, manifests
from sglang_hma.planner.systems import Site

FOLDER = Path(__file__).parent.parent / "deploy" / "kubernetes"
HEADER = """\
# Written by scripts/kubernetes_files.py from what `planner deploy` prints: change it there, or in a
# kustomization of your own (docs/deployment.md). Not tried on a cluster.
"""
MODEL = "/models/model"
PAIR = Plan(Site(), "ours", prefill=1, decode=1, model=MODEL, transfer="tcp")
CPU, CUDA, CARDS = (f"sglang-hma-{name}:{__version__}" for name in ("cpu", "cuda", "tenstorrent"))
PLAIN = Cluster(
    image=CPU,
    model_volume={"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
    discovery=True,
)
SMALL = replace(
    PLAIN, server_cpus="2", server_memory="8Gi", shared_memory="2Gi", startup_minutes=10
)
ON_GPUS = replace(PLAIN, images={"prefill": CUDA, "decode": CUDA})
ON_CARDS = replace(PLAIN, images={"prefill": CARDS, "decode": CUDA})
ON_RDMA = replace(ON_GPUS, rdma_resource="rdma/hca", host_network=True)


@dataclass(frozen=True)
class Overlay:
    """A fleet on some hardware; `below`: the folder that it is a difference from, None for the
    base."""

    fleet: Fleet
    cluster: Cluster
    below: str | None = None

    def manifests(self) -> list[Manifest]:
        return manifests(self.fleet, self.cluster)


def pair(cluster: Cluster, backend: str, *flags: str, limits: tuple[str, ...] = ()) -> Fleet:
    """A prefill and a decode server with the same flags and one of each resource."""
    shared = ["--enable-metrics", "--disaggregation-transfer-backend", backend, *flags]
    return Fleet(
        commands={role: [*of_pair(MODEL, role, POD_IP), *shared] for role in PAIR.roles},
        replicas=PAIR.roles,
        devices=dict.fromkeys(PAIR.roles, Devices(dict.fromkeys(limits, "1"))),
        router=router(PAIR, *finds_pods(PAIR, cluster), *router_waits(cluster)),
        model=MODEL,
    )


def overlays() -> dict[str, Overlay]:
    """By folder under deploy/kubernetes."""
    tcp, rdma, gpu = BACKENDS["tcp"], BACKENDS["rdma"], PLAIN.hbm_resource
    base = "base"
    return {
        base: Overlay(pair(PLAIN, tcp), PLAIN),
        "overlays/cpu": Overlay(pair(SMALL, tcp, "--device", "cpu"), SMALL, base),
        "overlays/nvidia": Overlay(pair(ON_GPUS, tcp, limits=(gpu,)), ON_GPUS, base),
        "overlays/tenstorrent": Overlay(fleet_of(PAIR, ON_CARDS), ON_CARDS, base),
        "overlays/rdma": Overlay(
            pair(ON_RDMA, rdma, limits=(gpu, "rdma/hca")), ON_RDMA, "overlays/nvidia"
        ),
    }


def files() -> dict[Path, str]:
    found = {}
    every = overlays()
    for folder, overlay in every.items():
        parts = _base(overlay) if overlay.below is None else _above(every[overlay.below], overlay)
        if overlay.below is not None:
            up = "/".join([".."] * len(Path(folder).parts))
            parts["kustomization.yaml"]["resources"].insert(0, f"{up}/{overlay.below}")
        for name, content in parts.items():
            documents = content if name in DOCUMENTS else [content]
            found[FOLDER / folder / name] = HEADER + as_yaml(documents)
    return found


DOCUMENTS = ("prefill.yaml", "decode.yaml", "router.yaml", "more.yaml")


def _kustomization(**fields: Any) -> Manifest:
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        **fields,
    }


def _base(overlay: Overlay) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in overlay.manifests():
        found.setdefault(f"{each['metadata']['labels'][COMPONENT]}.yaml", []).append(each)
    return {"kustomization.yaml": _kustomization(resources=list(found)), **found}


def _above(below: Overlay, overlay: Overlay) -> dict[str, Any]:
    there = {key(each): each for each in below.manifests()}
    found: dict[str, Any] = {}
    more, patches = [], []
    for each in overlay.manifests():
        kind, name = key(each)
        before = there.pop((kind, name), None)
        if before is None:
            more.append(each)
        elif operations := list(difference(before, each)):
            file = f"{name}.{kind.lower()}.patch.yaml"
            found[file] = operations
            patches.append({"target": {"kind": kind, "name": name}, "path": file})
    assert not there, f"an overlay takes nothing away, but {list(there)}"
    if more:
        found["more.yaml"] = more
    return {
        "kustomization.yaml": _kustomization(
            resources=["more.yaml"] if more else [], patches=patches
        ),
        **found,
    }


def key(document: Manifest) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def difference(before: Any, after: Any, path: str = "") -> Iterator[Manifest]:
    """As operations of RFC 6902; a list changes as a whole, unless it is of as many mappings."""
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for name in [*before, *(name for name in after if name not in before)]:
            where = f"{path}/{name.replace('~', '~0').replace('/', '~1')}"
            if name not in after:
                yield {"op": "remove", "path": where}
            elif name not in before:
                yield {"op": "add", "path": where, "value": after[name]}
            else:
                yield from difference(before[name], after[name], where)
    elif _mappings(before) and _mappings(after) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from difference(old, new, f"{path}/{index}")
    else:
        yield {"op": "replace", "path": path, "value": after}


def _mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def main() -> None:
    options = argparse.ArgumentParser(description="write deploy/kubernetes")
    options.add_argument("--check", action="store_true")
    wanted = files()
    there = {path: path.read_text() for path in FOLDER.rglob("*") if path.is_file()}
    if options.parse_args().check:
        stale = {path for path in {*wanted, *there} if wanted.get(path) != there.get(path)}
        if stale:
            names = ", ".join(sorted(str(path.relative_to(FOLDER)) for path in stale))
            sys.exit(f"deploy/kubernetes is stale ({names}): python {Path(__file__).name}")
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
