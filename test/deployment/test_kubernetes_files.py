"""deploy/kubernetes: what `planner deploy` prints, as kustomize puts it together."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from scripts import kubernetes_files
from scripts.kubernetes_files import FOLDER, difference

from .checks import check, check_discovery
from .documents import Deployed, Document

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(kubernetes_files.overlays())


def load(file: Path) -> list[Any]:
    return list(yaml.safe_load_all(file.read_text()))


def built(folder: Path) -> list[Document]:
    """What `kubectl kustomize` prints for a folder, of what these files use of it."""
    (plan,) = load(folder / "kustomization.yaml")
    found: list[Document] = []
    for each in plan["resources"]:
        path = (folder / each).resolve()
        found += built(path) if path.is_dir() else load(path)
    for patch in plan.get("patches", []):
        (operations,) = load(folder / patch["path"])
        (target,) = (
            each
            for each in found
            if {"kind": each["kind"], "name": each["metadata"]["name"]} == patch["target"]
        )
        for operation in operations:
            apply(target, **operation)
    return found


def apply(document: Any, op: str, path: str, value: Any = None) -> None:
    """An operation of RFC 6902, in place; a whole list is replaced, none is added to."""
    *above, last = (
        part.replace("~1", "/").replace("~0", "~") for part in path.removeprefix("/").split("/")
    )
    for part in above:
        document = document[int(part) if isinstance(document, list) else part]
    there = int(last) if isinstance(document, list) else last
    assert (op == "add") == (isinstance(document, dict) and there not in document)
    if op == "remove":
        del document[there]
    else:
        document[there] = copy.deepcopy(value)


def by_name(documents: list[Document]) -> dict[tuple[str, str], Document]:
    return {kubernetes_files.key(each): each for each in documents}


def test_they_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "kubernetes_files.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_overlay_is_a_whole_fleet(folder: str) -> None:
    documents = built(FOLDER / folder)
    assert by_name(documents) == by_name(kubernetes_files.overlays()[folder].manifests())
    deployed = Deployed(documents)
    check(deployed)
    check_discovery(deployed)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which has kustomize")
def test_kustomize_reads_them_as_we_do(folder: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / folder)], capture_output=True, text=True, check=True
    )
    assert by_name(list(yaml.safe_load_all(done.stdout))) == by_name(built(FOLDER / folder))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which has kustomize")
def test_the_documents_kustomization(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    (text,) = re.findall(r"```\n(apiVersion: kustomize.*?)```", page, re.DOTALL)
    mine = tmp_path / "mine"
    mine.mkdir()
    repository = os.path.relpath(ROOT, mine.resolve())
    (mine / "kustomization.yaml").write_text(text.replace("[..", f"[{repository}"))
    done = subprocess.run(
        ["kubectl", "kustomize", str(mine)], capture_output=True, text=True, check=True
    )
    deployed = Deployed(list(yaml.safe_load_all(done.stdout)))
    check(deployed)
    check_discovery(deployed)
    assert {each["metadata"]["namespace"] for each in deployed.documents} == {"serving"}
    sets = deployed.kind("StatefulSet")
    counts = {name: each["spec"]["replicas"] for name, each in sets.items()}
    assert counts == {"hma-prefill": 4, "hma-decode": 2}
    for name in deployed.pods:
        assert deployed.container(name)["image"].startswith("registry.example/sglang-hma-")


def overlay(name: str) -> Deployed:
    return Deployed(built(FOLDER / "overlays" / name))


def test_devices_of_both_vendors() -> None:
    limits = {}
    for name in ("cpu", "nvidia", "tenstorrent", "rdma"):
        deployed = overlay(name)
        for role in ("prefill", "decode"):
            container = deployed.container(deployed.of_role(role))
            limits[name, role] = container["resources"].get("limits", {})
    gpu = {"nvidia.com/gpu": "1"}
    assert limits.pop(("cpu", "prefill")) == limits.pop(("cpu", "decode")) == {}
    assert limits.pop(("tenstorrent", "prefill")) == {}
    assert limits.pop(("rdma", "prefill")) == limits.pop(("rdma", "decode"))
    assert set(map(str, limits.values())) == {str(gpu)}
    deployed = overlay("tenstorrent")
    (template,) = deployed.kind("ResourceClaimTemplate").values()
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"]["deviceClassName"] == "tenstorrent.com"
    assert deployed.arguments("hma-prefill").hma_prefill_runtime == "ttnn"


def test_rdma_is_for_both_sides() -> None:
    deployed = overlay("rdma")
    for name in deployed.sets:
        container, pod = deployed.container(name), deployed.pods[name]["spec"]
        assert deployed.arguments(name).disaggregation_transfer_backend == "mooncake"
        assert container["resources"]["limits"]["rdma/hca"] == "1"
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
        assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    for name in ("cpu", "nvidia", "tenstorrent"):
        deployed = overlay(name)
        backends = {
            deployed.arguments(each).disaggregation_transfer_backend for each in deployed.sets
        }
        assert backends == {"mooncake_tcp"}


def drawn(rng: Random, depth: int) -> Any:
    kind = rng.randrange(3) if depth else 0
    if kind == 0:
        return rng.choice(["a", 1, None, True, "x/y"])
    if kind == 1:
        return {rng.choice("abc/~"): drawn(rng, depth - 1) for _ in range(rng.randrange(4))}
    return [drawn(rng, depth - 1) for _ in range(rng.randrange(3))]


def test_a_difference_leads_from_one_to_the_other(seed: int) -> None:
    rng = Random(seed)
    for _ in range(500):
        before, after = ({"document": drawn(rng, 3)} for _ in range(2))
        changed = copy.deepcopy(before)
        for operation in difference(before, after):
            apply(changed, **operation)
        assert changed == after
