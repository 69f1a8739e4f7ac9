"""The address that a server's ports are bound to."""

import ipaddress
import os
import socket

from sglang_hma.launch.flags import Refusal

LOOPBACK = "127.0.0.1"
HOST_IP = "SGLANG_HOST_IP"
HOST_IPS = (HOST_IP, "HOST_IP")  # what SGLang takes for its own address, in this order


def bind_address(asked: str | None, host: str | None) -> str | None:
    """Of --hma-bind, of SGLang's variables or of --host; None for every interface.

    Raises Refusal for a --hma-bind that is not of this host.
    """
    if asked is None:
        told = next(filter(None, map(os.environ.get, HOST_IPS)), None)
        return one_address(told or host or LOOPBACK)
    family = socket.AF_INET6 if ":" in asked else socket.AF_INET
    with socket.socket(family) as sock:
        try:
            sock.bind((asked, 0))
        except OSError as error:
            raise Refusal(
                f"--hma-bind is {asked}: {error.strerror}; give an address of this host"
            ) from None
    return asked


def one_address(host: str) -> str | None:
    """What `host` stands for, IPv4 first, unless that is every address, or nothing."""
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    found = sorted({str(info[4][0]) for info in infos}, key=lambda address: ":" in address)
    return None if ipaddress.ip_address(found[0]).is_unspecified else found[0]
