"""What starts a mix: commands, the line of one box, or Kubernetes manifests."""

import argparse
import re
from pathlib import Path
from typing import Any, get_args

from sglang_hma.planner import catalogue, chosen, deployment
from sglang_hma.planner.commands.options import Refusal, add_command, add_site, site_of
from sglang_hma.planner.deployment import DEPLOYABLE, Plan
from sglang_hma.planner.kubernetes.cluster import ENDING_S, Cluster, Manifest, board_of
from sglang_hma.planner.kubernetes.fleet import fleet_of
from sglang_hma.planner.kubernetes.manifests import as_yaml, manifests
from sglang_hma.planner.model_shape import shape_of
from sglang_hma.planner.report import By
from sglang_hma.planner.systems import COLOCATED, Site, System, offer

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
CLAIM = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
RESOURCE = re.compile(r"[a-z0-9][-.a-z0-9]*/[A-Za-z0-9][-_.A-Za-z0-9]{0,62}")
CPUS = re.compile(r"\d+(\.\d+)?|\d+m")
QUANTITY = re.compile(r"\d+(\.\d+)?([KMGT]i?)?")


def add(commands: Any) -> None:
    start = add_command(
        commands,
        "deploy",
        run,
        help="what starts a mix",
        description="Print what starts a mix: the command of each host, prefill-N and decode-N, "
        "and the router's (lines); one launch_pd line for one box (launch-pd); manifests for "
        "kubectl apply -f - (kubernetes).",
    )
    start.add_argument("--format", choices=("lines", "launch-pd", "kubernetes"), default="lines")
    start.add_argument("--model-path", required=True, metavar="M", help="where the hosts have it")
    mix = start.add_argument_group("which mix: from a comparison, or named")
    mix.add_argument(
        "--from", dest="file", type=Path, metavar="FILE", help="take the best mix of compare --json"
    )
    mix.add_argument(
        "--by", choices=get_args(By), default="dollar", help="with --from: what makes it the best"
    )
    mix.add_argument(
        "--system", choices=DEPLOYABLE, help="ours; with --from the best of all of these"
    )
    mix.add_argument("--prefill", type=int, metavar="N", help="instances; without --from 1")
    mix.add_argument("--decode", type=int, metavar="N", help="instances; without --from 1")
    mix.add_argument(
        "--model", help="whose sizes to plan with; without --from Qwen3-8B, else the file's"
    )
    start.add_argument(
        "--transfer",
        choices=get_args(deployment.Transfer),
        help="how KV travels, the same on both sides; without it tcp from GDDR cards and rdma "
        "between GPUs, on Kubernetes rdma where --rdma-resource is given",
    )
    add_site(start)
    _add_cluster(start)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("kubernetes")
    plain = Cluster(image="")
    add = group.add_argument
    add("--image", metavar="I", help="with this package, SGLang and sglang-router in it; needed")
    add("--prefill-image", metavar="I", help="of prefill servers, where theirs is another")
    add("--name", default=plain.name, help="what names of all objects begin with")
    add("--namespace", metavar="NS", help="of all objects; without it kubectl's")
    add(
        "--model-volume",
        metavar="hostPath:DIR|pvc:NAME",
        help="what is mounted where the folder above --model-path is; needed if that is a path",
    )
    add("--hbm-resource", default=plain.hbm_resource, metavar="R", help="of a GPU")
    add(
        "--gddr-resource",
        metavar="R",
        help="of a GDDR card, where a device plugin counts them (tenstorrent.com/p150); without "
        "it cards are claimed from Tenstorrent's DRA driver (tt-operator, Kubernetes 1.34)",
    )
    add("--gddr-board", metavar="B", help="how that driver names --gddr; without it as p100 p100a")
    add("--rdma-resource", metavar="R", help="of an RDMA device plugin, one for each server")
    add("--host-network", action="store_true", help="servers use the node's; one on each node")
    add(
        "--service-discovery",
        action="store_true",
        help="the router finds servers by their labels, so that kubectl scale changes the mix; "
        "without it servers have names, and decode takes pages from those alone",
    )
    add(
        "--cluster-secret",
        default=plain.secret,
        metavar="NAME",
        help="of the Secret with a key `secret` that all servers share",
    )
    add(
        "--metrics-namespace",
        default=plain.metrics_namespace,
        metavar="NS",
        help="whose pods may read servers' metrics",
    )
    add("--server-cpus", default=plain.server_cpus, metavar="N", help="that a server asks for")
    add("--server-memory", default=plain.server_memory, metavar="SIZE", help="the same of memory")
    add("--shared-memory", default=plain.shared_memory, metavar="SIZE", help="of /dev/shm")
    add(
        "--startup-minutes",
        type=int,
        default=plain.startup_minutes,
        metavar="MIN",
        help="that a server may take to load the model",
    )
    add(
        "--grace-seconds",
        type=int,
        default=plain.grace_seconds,
        metavar="S",
        help="that a server may take to finish its requests when it is told to stop",
    )


def run(args: argparse.Namespace) -> None:
    plan = _plan(args)
    if args.format == "lines":
        print("\n".join(deployment.lines(plan)))
    elif args.format == "launch-pd":
        print(deployment.launch_pd(plan))
    else:
        cluster = _cluster(args, plan.site.gddr)
        print(as_yaml(manifests(fleet_of(plan, cluster), cluster)), end="")


def _plan(args: argparse.Namespace) -> Plan:
    model, site = args.model or "Qwen3-8B", site_of(args)
    system: System = args.system or "ours"
    prefill, decode = args.prefill, args.decode
    for flag, value in (("--prefill", prefill), ("--decode", decode)):
        if value is not None and value < 1:
            raise Refusal(f"{flag} is {value}; needs 1 or more")
    if args.file:
        found, best = chosen.best_of(args.file, args.by, args.system)
        _refuse_beside_file(args, site)
        model, site, system = args.model or found.model, found.site, best.system
        prefill, decode = best.prefill, best.decode
    known, shape = catalogue.load(*args.catalogue), shape_of(model)
    prefill, decode = 0 if system in COLOCATED else prefill or 1, decode or 1
    offer(known, shape, site, system, prefill, decode)  # whether the model fits
    transfer = _transfer(args) if args.format == "kubernetes" else args.transfer
    chips = known.card(site.gddr).chips
    plan = Plan(site, system, prefill, decode, args.model_path, chips, transfer)
    deployment.check(plan, shape)
    return plan


def _refuse_beside_file(args: argparse.Namespace, site: Site) -> None:
    """What the file says already."""
    plain = Site()
    given = [
        name for name in Site.__dataclass_fields__ if getattr(site, name) != getattr(plain, name)
    ]
    given += [name for name in ("prefill", "decode") if getattr(args, name) is not None]
    if given:
        flag = given[0].replace("_", "-")
        raise Refusal(f"--{flag} does not go with --from {args.file}, which has it: leave it out")


def _transfer(args: argparse.Namespace) -> deployment.Transfer:
    if args.transfer == "rdma" and not args.rdma_resource:
        raise Refusal("--transfer is rdma: a pod has no RDMA device without --rdma-resource")
    chosen_one: deployment.Transfer = args.transfer or ("rdma" if args.rdma_resource else "tcp")
    return chosen_one


def _cluster(args: argparse.Namespace, gddr: str) -> Cluster:
    if not args.image:
        raise Refusal("--format is kubernetes: give --image, what the pods run")
    for flag, value, form, example in (
        ("--name", args.name, NAME, "hma"),
        ("--namespace", args.namespace, NAME, "serving"),
        ("--metrics-namespace", args.metrics_namespace, NAME, "monitoring"),
        ("--cluster-secret", args.cluster_secret, CLAIM, "sglang-hma-cluster"),
        ("--hbm-resource", args.hbm_resource, RESOURCE, "nvidia.com/gpu"),
        ("--gddr-resource", args.gddr_resource, RESOURCE, "tenstorrent.com/p150"),
        ("--rdma-resource", args.rdma_resource, RESOURCE, "rdma/hca"),
        ("--shared-memory", args.shared_memory, QUANTITY, "16Gi"),
        ("--server-memory", args.server_memory, QUANTITY, "64Gi"),
        ("--server-cpus", args.server_cpus, CPUS, "8 or 500m"),
    ):
        if value is not None and not form.fullmatch(value):
            raise Refusal(f"{flag} is {value!r}: Kubernetes takes one like {example}")
    for flag, number, least in (
        ("--startup-minutes", args.startup_minutes, 1),
        ("--grace-seconds", args.grace_seconds, ENDING_S + 1),
    ):
        if number < least:
            raise Refusal(f"{flag} is {number}; needs {least} or more")
    return Cluster(
        image=args.image,
        images={"prefill": args.prefill_image} if args.prefill_image else {},
        name=args.name,
        namespace=args.namespace,
        model_volume=_model_volume(args.model_path, args.model_volume),
        board=args.gddr_board or board_of(gddr),
        gddr_resource=args.gddr_resource,
        hbm_resource=args.hbm_resource,
        rdma_resource=args.rdma_resource,
        host_network=args.host_network,
        discovery=args.service_discovery,
        secret=args.cluster_secret,
        metrics_namespace=args.metrics_namespace,
        server_cpus=args.server_cpus,
        server_memory=args.server_memory,
        shared_memory=args.shared_memory,
        startup_minutes=args.startup_minutes,
        grace_seconds=args.grace_seconds,
    )


def _model_volume(model: str, given: str | None) -> Manifest | None:
    """Of a pod, without its name."""
    if given is None:
        if model.startswith("/"):
            raise Refusal(
                f"--model-path is {model}: a pod has it from --model-volume, hostPath:DIR or "
                "pvc:NAME"
            )
        return None
    if not model.startswith("/") or model.rstrip("/").count("/") < 2:
        raise Refusal(f"--model-path is {model}: with --model-volume it needs to be /a/path")
    kind, _, source = given.partition(":")
    if kind == "hostPath" and source.startswith("/"):
        return {"hostPath": {"path": source, "type": "Directory"}}
    if kind == "pvc" and CLAIM.fullmatch(source):
        return {"persistentVolumeClaim": {"claimName": source, "readOnly": True}}
    raise Refusal(f"--model-volume is {given!r}: needs hostPath:/a/folder or pvc:a-claim")
