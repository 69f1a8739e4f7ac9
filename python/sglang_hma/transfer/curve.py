"""Control sockets that only holders of the cluster secret can speak to: ZeroMQ's CURVE.

A connection is encrypted and authenticated both ways (RFC 26/CurveZMQ): keys of its own for each
connection and a counter in each message, so that nothing can be said again, here or elsewhere. The
long-term keys are made from the secret, other ones for each role and for each end.
"""

from collections.abc import Mapping

import zmq
import zmq.utils.z85
from zmq.auth.thread import ThreadAuthenticator

from sglang_hma.cluster_secret import PEER, ClusterKeys, Server

DOMAIN = "sglang-hma"


def _pair(private: bytes) -> tuple[bytes, bytes]:
    """(public, private) as ZeroMQ writes them. Raises RuntimeError where it has no CURVE."""
    if not zmq.has("curve"):
        raise RuntimeError(
            "--hma-cluster-secret-file needs a pyzmq with CURVE (libsodium): install pyzmq's wheel"
        )
    text = zmq.utils.z85.encode(private)
    return zmq.curve_public(text), text


def listening_options(keys: ClusterKeys, role: Server) -> Mapping[int, int | bytes]:
    """Of the socket on which a server of this role listens; `authenticator` must run in its
    context before it does."""
    _, private = _pair(keys.listening(role))
    return {
        zmq.CURVE_SERVER: 1,
        zmq.CURVE_SECRETKEY: private,
        zmq.ZAP_DOMAIN: DOMAIN.encode(),
        zmq.ZAP_ENFORCE_DOMAIN: 1,  # without its authenticator it lets nobody in
    }


def calling_options(keys: ClusterKeys, role: Server) -> Mapping[int, int | bytes]:
    """Of a socket with which a server of this role speaks to one of the other."""
    peer, _ = _pair(keys.listening(PEER[role]))
    public, private = _pair(keys.calling(role))
    return {zmq.CURVE_SERVERKEY: peer, zmq.CURVE_PUBLICKEY: public, zmq.CURVE_SECRETKEY: private}


class _OnlyThePeer:
    """Who may connect: pyzmq's CurveZMQCredentialsProvider."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


def authenticator(
    context: "zmq.Context[zmq.Socket[bytes]]", keys: ClusterKeys, role: Server
) -> ThreadAuthenticator:
    """A thread that lets the other role's servers connect to sockets of this context, and nobody
    else. To be made before the context gets options of its own."""
    public, _ = _pair(keys.calling(PEER[role]))
    made = ThreadAuthenticator(context)
    made.start()
    made.configure_curve_callback(domain=DOMAIN, credentials_provider=_OnlyThePeer(public))
    return made
