"""Which runtime computes on a prefill server, and which Tenstorrent cards it has."""

import argparse
from importlib.util import find_spec

from sglang_hma.config import MESHES, PrefillRuntime
from sglang_hma.launch.flags import Refusal


def prefill_runtime(given: argparse.Namespace) -> PrefillRuntime:
    """--hma-prefill-runtime, with auto decided: the card where there is one and nothing speaks
    against it."""
    chosen: PrefillRuntime | str = given.hma_prefill_runtime
    fits = (
        given.disaggregation_mode == "prefill"
        and given.hma_kv_format == "bfp8"
        and given.device in (None, "cpu")
    )
    if chosen == "ttnn" and not fits:
        raise Refusal(
            "--hma-prefill-runtime is ttnn: a card serves --disaggregation-mode prefill with "
            "--hma-kv-format bfp8, and no --device but cpu goes with it"
        )
    if chosen == "auto":
        from sglang_hma.prefill.ttnn.card import visible_cards

        there = fits and given.device is None and visible_cards() and find_spec("ttnn") is not None
        chosen = "ttnn" if there else "reference"
    if chosen == "ttnn":
        return "ttnn"
    for flag, value in (
        ("--hma-device-ids", given.hma_device_ids),
        ("--hma-mesh", given.hma_mesh),
    ):
        if value is not None:
            raise Refusal(f"{flag} is given, but no card computes: add --hma-prefill-runtime ttnn")
    return "reference"


def cards(given: argparse.Namespace, runtime: PrefillRuntime) -> tuple[tuple[int, ...], int]:
    """Numbers of the cards and how many of their chips form a mesh."""
    ids = given.hma_device_ids or (0,)
    chips = given.hma_mesh or len(ids)
    if chips < len(ids) or chips not in MESHES.values():
        shown = ",".join(map(str, ids))
        raise Refusal(
            f"--hma-device-ids is {shown}: 1, 2 or 4 cards form a mesh, of one chip each or of the "
            "number in --hma-mesh"
        )
    if runtime == "ttnn":
        from sglang_hma.prefill.ttnn.card import CardError, require_cards

        try:
            require_cards(ids)
        except CardError as error:
            raise Refusal(str(error)) from None
    return ids, chips
