"""How many answers a request asks for: each is a request of its own to a pair, with a room."""

from typing import Any


def rooms(path: str, asked: dict[str, Any]) -> int:
    """At least 1. What SGLang will refuse counts as 1."""
    if path == "/generate":
        return prompts_of_generate(asked) * samples(_first(asked.get("sampling_params")))
    if path == "/v1/completions":
        return prompts_of_completion(asked.get("prompt")) * samples(asked)
    if path == "/v1/chat/completions":
        return samples(asked)
    return 1


def prompts_of_generate(asked: dict[str, Any]) -> int:
    text, ids = asked.get("text"), asked.get("input_ids")
    if text is not None:
        return max(1, len(text)) if isinstance(text, list) else 1
    if isinstance(ids, list) and ids and isinstance(ids[0], list):
        return len(ids)
    embeds: Any = asked.get("input_embeds")
    depth, inside = 0, embeds
    while isinstance(inside, list) and inside:
        depth, inside = depth + 1, inside[0]
    return len(embeds) if depth == 3 else 1


def prompts_of_completion(prompt: Any) -> int:
    """A list of token ids is one prompt."""
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
        return 1
    return len(prompt)


def samples(fields: Any) -> int:
    n = fields.get("n") if isinstance(fields, dict) else None
    beams = fields.get("beam_width") if isinstance(fields, dict) else None
    if type(beams) is int and beams > 1:
        return 1
    return n if type(n) is int and n > 1 else 1


def _first(params: Any) -> Any:
    return params[0] if isinstance(params, list) and params else params
