"""Kubernetes manifests, as Kubernetes, SGLang's server and its router read them."""

import argparse
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import kubernetes_validate
from sglang_router.router_args import RouterArgs

from sglang_hma.launch import arguments

KUBERNETES = "1.34"  # the first whose claims are resource.k8s.io/v1
Document = dict[str, Any]


@cache
def server_parser() -> argparse.ArgumentParser:
    return arguments.full_parser()


def of_kind(documents: list[Document], kind: str) -> dict[str, Document]:
    return {each["metadata"]["name"]: each for each in documents if each["kind"] == kind}


def flags_of(container: Document) -> list[str]:
    """Of the Python module that it starts."""
    command = container.get("args") or container["command"]
    assert command[:2] == ["python", "-m"]
    return list(command[3:])


def routes(container: Document) -> RouterArgs:
    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser)
    return RouterArgs.from_cli_args(parser.parse_args(flags_of(container)))


def matches(selector: Document, labels: dict[str, str]) -> bool:
    plain = selector.get("matchLabels", {}).items() <= labels.items()
    return plain and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ())
    )


def labels_of(pod: Document) -> dict[str, str]:
    return dict(pod["metadata"]["labels"])


def named_ports(container: Document) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def variables(container: Document) -> dict[str, str]:
    """The pod's field that each environment variable has."""
    return {each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"] for each in container["env"]}


@dataclass
class Deployed:
    """What `documents` make. A `name` is that of a StatefulSet or of the Deployment."""

    documents: list[Document] = field(default_factory=list)

    def validate(self) -> None:
        """By Kubernetes' own schemas; no field that they do not have."""
        for document in self.documents:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)

    def kind(self, kind: str) -> dict[str, Document]:
        return of_kind(self.documents, kind)

    @property
    def sets(self) -> list[str]:
        return list(self.kind("StatefulSet"))

    @property
    def pods(self) -> dict[str, Document]:
        """Templates by the name of what makes them."""
        makers = {**self.kind("StatefulSet"), **self.kind("Deployment")}
        return {name: maker["spec"]["template"] for name, maker in makers.items()}

    @property
    def router(self) -> str:
        (name,) = self.kind("Deployment")
        return name

    def container(self, name: str) -> Document:
        (found,) = self.pods[name]["spec"]["containers"]
        return dict(found)

    def arguments(self, name: str) -> argparse.Namespace:
        return server_parser().parse_args(flags_of(self.container(name)))

    def selected(self, selector: Document) -> set[str]:
        """Whose pods a selector means, as Kubernetes reads it."""
        return {name for name, pod in self.pods.items() if matches(selector, labels_of(pod))}

    def of_role(self, role: str) -> str:
        (name,) = (name for name in self.sets if name.endswith(f"-{role}"))
        return name
