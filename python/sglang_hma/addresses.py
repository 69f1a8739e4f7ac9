"""host:port of a server, in one spelling."""

import ipaddress
import re

MAX_HOST_CHARS = 253
NAME = re.compile(r"[A-Za-z0-9._-]+")


def canonical_host(host: str) -> str:
    """A host name in lower case, or an IP address as Python's ipaddress writes it.

    Raises ValueError for anything else.
    """
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        if len(bare) > MAX_HOST_CHARS or not NAME.fullmatch(bare):
            raise ValueError("it is neither an IP address nor a host name") from None
        return bare.lower()


def canonical(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets. Raises ValueError."""
    bare = canonical_host(host)
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def parse(text: str) -> str:
    """`canonical` of "host:port" in any spelling. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdecimal()) or not 1 <= int(port) <= 65535:
        raise ValueError("it is not HOST:PORT")
    if ":" in host and not host.startswith("["):
        raise ValueError("an IPv6 address stands in brackets, [HOST]:PORT")
    return canonical(host, int(port))
