"""The secret that the servers of one cluster share, and the keys that are made from it.

Every key is HMAC-SHA256 of what it is for, under the secret: who learns one learns no other.
"""

import hmac
import os
import secrets
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from sglang_hma.config import HmaConfig

MIN_BYTES, MAX_BYTES = 32, 4096
OTHERS = 0o007  # in a file's mode
MAKE_ONE = "(umask 077; openssl rand -hex 32 > {path})"

Server = Literal["prefill", "decode"]
PEER: dict[str, Server] = {"prefill": "decode", "decode": "prefill"}


def read(path: str) -> bytes:
    """The secret in a file, without white space around it.

    Raises ValueError, in one line, if it is missing, short, or open to every user of the host.
    """
    try:
        mode = os.stat(path).st_mode
        with open(path, "rb") as file:
            secret = file.read(MAX_BYTES + 1).strip()
    except OSError as error:
        raise ValueError(f"{error.strerror}; make one with {MAKE_ONE.format(path=path)}") from None
    if len(secret) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES} bytes, which is no secret")
    if len(secret) < MIN_BYTES:
        raise ValueError(
            f"it has {len(secret)} bytes, and needs {MIN_BYTES}; make one with "
            f"{MAKE_ONE.format(path=path)}"
        )
    if mode & OTHERS:
        raise ValueError(f"every user of this host can read or change it: chmod 600 {path}")
    return secret


def make(path: Path) -> None:
    """A new secret in a new file that nobody else can read. Raises OSError."""
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(MIN_BYTES) + "\n")


@dataclass(frozen=True)
class ClusterKeys:
    """What one secret is used for."""

    secret: bytes

    def of(self, purpose: str) -> bytes:
        """32 bytes."""
        return hmac.digest(self.secret, f"sglang-hma 1: {purpose}".encode(), "sha256")

    @property
    def bootstrap(self) -> bytes:
        """Of what is asked of a bootstrap server, and what it answers."""
        return self.of("bootstrap")

    def listening(self, role: Server) -> bytes:
        """The private CURVE key of this role's control sockets."""
        return self.of(f"control socket of {role}")

    def calling(self, role: Server) -> bytes:
        """The private CURVE key with which this role connects to the other's."""
        return self.of(f"messages of {role}")


@cache
def _keys(path: str) -> ClusterKeys:
    return ClusterKeys(read(path))


def server_role() -> Server:
    """This process's; raises RuntimeError in a server that has no peer."""
    role = HmaConfig.require().role
    if role == "null":
        raise RuntimeError("a server that both prefills and decodes has no peer")
    return role


def keys() -> ClusterKeys | None:
    """This server's; None if it was started without --hma-cluster-secret-file.

    The file is read once in each process: it may be gone later.
    """
    config = HmaConfig.from_env()
    path = config.cluster_secret_file if config is not None else None
    return _keys(path) if path is not None else None
