"""How a request's KV pages get from a prefill server to a decode server (docs/transfer.md).

Words used throughout:

room         SGLang's number for one request, the same on both servers.
session      the name of a peer's Mooncake engine, "host:port"; a restarted server gets a new one.
generation   a random number that decode draws for each request. It tells a request from an
             earlier one that had the same room.
claim        decode's message that it has the other half of a request and still wants it. Decode
             renews its claims until the request ends there.
kind         full or window: pages of layers that see all of a prompt, and of layers that see a
             window of it, where those have a pool of their own. Lists, layers and buffers are
             counted within their kind (kvcache/format.py).
hold         a mark on pages that a transfer still reads. A held page that is freed is not handed
             out again before the hold is released.
"""
