"""The commands that start a mix."""

from sglang_hma.planner.systems import Offer, Site

PORT, BOOTSTRAP = 30001, 8998


def lines(site: Site, offer: Offer, model: str) -> list[str]:
    """For hosts named prefill-N and decode-N, one instance each, and a router on decode-0."""
    if not offer.prefill:
        return [
            f"decode-{index} $ python -m sglang.launch_server --model-path {model} "
            f"--host 0.0.0.0 --port {PORT}{_shared(site.hbm_cards)}"
            f" --chunked-prefill-size {site.chunk_tokens}"
            f"{' --enable-mixed-chunk' if site.mixed else ''}"
            for index in range(offer.decode)
        ] + [
            "decode-0 $ python -m sglang_router.launch_router --host 0.0.0.0 --port 30000 "
            "--worker-urls "
            + " ".join(f"http://decode-{index}:{PORT}" for index in range(offer.decode))
        ]
    found = [
        f"prefill-{index} $ {_server(offer, model, 'prefill')}"
        f"{_prefill_flags(site, offer)} --chunked-prefill-size {site.chunk_tokens}"
        for index in range(offer.prefill)
    ]
    found += [
        f"decode-{index} $ {_server(offer, model, 'decode')}{_shared(site.hbm_cards)}"
        for index in range(offer.decode)
    ]
    routes = [f"--prefill http://prefill-{i}:{PORT} {BOOTSTRAP}" for i in range(offer.prefill)]
    routes += [f"--decode http://decode-{i}:{PORT}" for i in range(offer.decode)]
    found.append(
        "decode-0 $ python -m sglang_router.launch_router --pd-disaggregation --policy "
        f"power_of_two {' '.join(routes)} --host 0.0.0.0 --port 30000"
    )
    return found


def _server(offer: Offer, model: str, role: str) -> str:
    ours = offer.system in ("hetero-serial", "ours")
    flags = [f"--model-path {model} --disaggregation-mode {role} --host 0.0.0.0 --port {PORT}"]
    if role == "prefill":
        flags.append(f"--disaggregation-bootstrap-port {BOOTSTRAP}")
    if not ours:
        flags.append("--hma-kv-format native")
    if offer.system == "pd-fp8":
        flags.append("--kv-cache-dtype fp8_e4m3")
    if offer.system == "hetero-serial" and role == "prefill":
        flags.append("--hma-layers-per-send all")
    return f"python -m sglang_hma.launch_server {' '.join(flags)}"


def _prefill_flags(site: Site, offer: Offer) -> str:
    if offer.system in ("pd-bf16", "pd-fp8"):
        return _shared(site.hbm_cards)
    cards = ",".join(map(str, range(site.gddr_cards)))
    return f" --hma-prefill-runtime ttnn --hma-device-ids {cards}"


def _shared(cards: int) -> str:
    return f" --tp-size {cards}" if cards > 1 else ""
