"""What SGLang itself asks of bootstrap servers, sealed where there is a cluster secret."""

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang_hma import cluster_secret
from sglang_hma.transfer.bootstrap import SEAL_HEADER, proves, question
from sglang_hma.transfer.seals import seal


def get_bootstrap_session(original: Callable[..., Any], bootstrap_addr: str) -> Any:
    """SGLang's `requests.Session` for this server."""
    session = original(bootstrap_addr)
    keys = cluster_secret.keys()
    if keys is not None and session.auth is None:
        session.auth = Sealed(keys.bootstrap)
    return session


class Sealed:
    """Authentication of a `requests.Session`: seals requests, and takes no answer that does not
    prove that its server knows the secret."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __call__(self, request: Any) -> Any:
        body = request.body or b""
        content = body.encode() if isinstance(body, str) else body
        asked = seal(self._key, question(request.method, request.path_url), content)
        request.headers[SEAL_HEADER] = asked
        request.register_hook("response", partial(self._check, asked))
        return request

    def _check(self, asked: str, response: Any, **_: Any) -> None:
        status, body = response.status_code, response.content
        if not proves(self._key, asked, status, response.headers, body):
            raise ConnectionError(f"{response.url} does not prove that it knows the cluster secret")
