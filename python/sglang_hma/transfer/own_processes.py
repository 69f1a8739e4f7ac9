"""What tells this server's own processes from everybody else who reaches its ports.

They seal what they say with a key (seals.py). The launcher draws it and puts it into the
environment, which the processes that it starts inherit. The nodes of one server must be given the
same: set it on each of them.
"""

import os
import secrets

KEY_ENV = "SGLANG_HMA_OWN_KEY"


def prepare() -> None:
    """Called by the launcher before it starts a process."""
    os.environ.setdefault(KEY_ENV, secrets.token_hex(16))


def key() -> bytes:
    """Raises RuntimeError if there is none."""
    found = os.environ.get(KEY_ENV)
    if not found:
        raise RuntimeError(
            f"{KEY_ENV} is not set: start the server with python -m sglang_hma.launch_server"
        )
    return found.encode()
