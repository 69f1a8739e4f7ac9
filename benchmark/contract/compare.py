"""One server's answers beside a pair's, field by field.

python -m benchmark.contract.compare SINGLE_URL PAIR_URL [--json FILE]
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import requests

from benchmark.contract.fields import APIS, GIVEN_ID, Api

# Differ from run to run, or say how it went and where.
OWN = ("id", "created", "rid", "e2e_latency", "cached_tokens", "prompt_tokens_details", "dp_rank")
TIMES = ("_time", "_ts", "_s", "_wait", "latency", "throughput", "cached_tokens_details")
CLOSE = 0.05  # of a logprob: a rounding of K to BF16 that turned
EFFECT, REFUSED, SAME, OTHER = "takes effect", "refused", "as one server", "DIFFERENT"


@dataclass(frozen=True)
class Answer:
    status: int
    kind: str  # content type
    said: Any

    @property
    def refusal(self) -> str:
        """What a refusal says, in a line."""
        said = self.said
        while isinstance(said, dict):
            said = said.get("message", said.get("error"))
        return " ".join(str(said).split())


@dataclass(frozen=True)
class Row:
    """`outcome`: EFFECT (the answer is another one, and the same on both), SAME (it is no other
    one, on both), REFUSED or OTHER; `detail`: the refusal, or both answers."""

    api: str
    field: str
    value: str
    outcome: str
    detail: str = ""


def ask(url: str, path: str, body: dict[str, Any]) -> Answer:
    reply = requests.post(url + path, json=body)
    kind = reply.headers.get("content-type", "")
    return Answer(reply.status_code, kind, shown(reply))


def shown(reply: requests.Response) -> Any:
    """Without what differs from run to run. A stream is what its lines say."""
    if reply.headers.get("content-type", "").startswith("text/event-stream"):
        lines = [line[6:] for line in reply.text.split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else cleaned(json.loads(line)) for line in lines]
    try:
        return cleaned(reply.json())
    except ValueError:
        return reply.content.hex()


def cleaned(value: Any) -> Any:
    if isinstance(value, list):
        return [cleaned(each) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, each in value.items():
        own = name in OWN or any(name.endswith(end) for end in TIMES)
        if not own or (isinstance(each, str) and GIVEN_ID in each):
            kept[name] = cleaned(each)
    return kept


def same(one: Any, another: Any) -> bool:
    if isinstance(one, dict) and isinstance(another, dict):
        return one.keys() == another.keys() and all(same(one[k], another[k]) for k in one)
    if isinstance(one, list) and isinstance(another, list):
        return len(one) == len(another) and all(map(same, one, another))
    if isinstance(one, float) and isinstance(another, float):
        return abs(one - another) <= CLOSE
    return type(one) is type(another) and one == another


def difference(one: Any, another: Any, where: str = "") -> str:
    """The first place where they are not the same."""
    if same(one, another):
        return ""
    if isinstance(one, dict) and isinstance(another, dict) and one.keys() == another.keys():
        return next(found for k in one if (found := difference(one[k], another[k], f"{where}.{k}")))
    if isinstance(one, list) and isinstance(another, list) and len(one) == len(another):
        pairs = enumerate(zip(one, another, strict=True))
        return next(found for i, (a, b) in pairs if (found := difference(a, b, f"{where}[{i}]")))
    return f"{where}: {str(one)[:200]} | {str(another)[:200]}"


def compared(api: Api, name: str, single: str, pair: str) -> Row:
    case = api.cases[name]
    plain = ask(single, api.path, api.body(case))
    body = api.body(case, name)
    expected, found = ask(single, api.path, body), ask(pair, api.path, body)
    value = json.dumps(case.value)
    if found.status >= 400:
        named = name in found.refusal
        both = expected.status == found.status and same(expected.said, found.said)
        outcome = REFUSED if both or (named and found.status < 500) else OTHER
        return Row(api.name, name, value, outcome, found.refusal)
    if not same(asdict(expected), asdict(found)):
        return Row(api.name, name, value, OTHER, difference(asdict(expected), asdict(found)))
    effect = not same(asdict(plain), asdict(expected))
    return Row(api.name, name, value, EFFECT if effect else SAME)


def rows(single: str, pair: str) -> Iterator[Row]:
    for api in APIS:
        for name in api.cases:
            yield compared(api, name, single, pair)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("single")
    parser.add_argument("pair")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = []
    for row in rows(given.single, given.pair):
        found.append(row)
        print(f"{row.api:22} {row.field:36} {row.outcome:14} {row.detail[:300]}", flush=True)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    return any(row.outcome == OTHER for row in found)


if __name__ == "__main__":
    sys.exit(main())
