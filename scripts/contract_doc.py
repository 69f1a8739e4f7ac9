"""Write docs/client-contract.md from docs/benchmarks/client_contract.json and conformance.json.

    python scripts/contract_doc.py            write it
    python scripts/contract_doc.py --check    exit code 1 if it is stale

The figures are what test/e2e/test_fields.py and test_conformance.py leave with
HMA_CONTRACT_JSON=FILE and HMA_CONFORMANCE_JSON=FILE.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmark.contract.fields import APIS, WITHOUT_EFFECT
from sglang_hma.seams import SGLANG_VERSION

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "benchmarks"
DOCUMENT = ROOT / "docs" / "client-contract.md"

PAGE = """# What a client may send

Written by `python scripts/contract_doc.py` from what `test/e2e/test_fields.py` and
`test/e2e/test_conformance.py` have seen, on SGLang {version}.

A pair answers as one server does. Clients speak to the entry (`python -m
sglang_hma.launch.router`, which `launch_pd` starts): it hands SGLang's router requests that it
understands, with the client's own bytes inside, and the servers take them out
([how](architecture.md#the-entry)). So nothing of a request is lost on the way, and what is
refused is refused by the server, in its own words.

## Fields

Each is sent with a value whose effect can be seen, to one server and through the entry to a pair,
both in float32: answers must be the same, token for token, and logprobs as close as a rounding
that turned. {counts}.

- **takes effect**: the answer is another one than without the field, and the same on both.
- **as one server**: the answer is the same without it, on both, for the reason that is given.
- **refused**: with HTTP 400 and this message. Where one server refuses too, in the same words.

{tables}

## SGLang's own test cases

Those of its installed package (`sglang.test.kits`) that speak to a URL and need no GPU, run as
they are on one server and on a pair of the same random model (`python -m benchmark.contract.kits
URL MODEL` runs them on any): {passed} of {all} pass on both. The others fail on both, so on
one server too, and none comes out otherwise on a pair; most want a trained model (a capital, a
JSON object that ends), and why each of them fails has not been looked into. The kit of Anthropic's
client was not run: that client is not installed. The OpenAI client's chat, completions,
logprobs and streams: `test/e2e/test_clients.py`.

| kit | cases | pass on one server | pass on a pair |
|---|---|---|---|
{kits}

## Known

- A grammar with `ignore_eos` goes on for one token after its end, which is any; a request that
  was put aside in a full pool ends without it.
- `beam_width` and `return_hidden_states` are refused on a pair: prefill would have to send what
  SGLang does not.
- Sessions (`/open_session`) are of one server's cache: their routes are not on the entry, and
  `--enable-streaming-session` and `--enable-session-radix-cache` are refused on a pair, as
  `--enable-return-routed-experts` and `--enable-return-indexer-topk` are: decode answers, and has
  only its own.
- What only one of the two servers refuses (a prompt that is too long for its pool, an adapter that
  it has not) is answered with 400 and its reason; the other gives its half up at once.
- A server's failure (a status from 500 on) is told in the router's words. `/get_load` SGLang has
  no more; `/v1/responses` it serves where openai-harmony is installed, and fails elsewhere (500).
"""


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| field | sent | outcome |", "|---|---|---|"]
    for row in rows:
        said = row["outcome"]
        if said == "as one server":
            said += f": {WITHOUT_EFFECT[row['field']]}"
        elif row["detail"]:
            detail = row["detail"].replace("|", "/").replace("`", "")
            said += f": {detail[:160]}{'...' if len(detail) > 160 else ''}"
        value = row["value"] if len(row["value"]) <= 40 else row["value"][:37] + "..."
        lines.append(f"| `{row['field']}` | `{value.replace('|', '/')}` | {said} |")
    return "\n".join(lines)


def page() -> str:
    rows = json.loads((FIGURES / "client_contract.json").read_text())
    kits = json.loads((FIGURES / "conformance.json").read_text())
    outcomes = Counter(row["outcome"] for row in rows)
    tables = [
        f"### {api.name}, `{api.path}`\n\n{table([row for row in rows if row['api'] == api.name])}"
        for api in APIS
    ]
    lines, both, cases = [], 0, 0
    for kit, found in kits.items():
        single, pair = (sum(each[index] for each in found.values()) for index in (0, 1))
        both, cases = both + pair, cases + len(found)
        lines.append(f"| `{kit.rpartition('.')[2]}` | {len(found)} | {single} | {pair} |")
    counts = ", ".join(f"{number} *{outcome}*" for outcome, number in outcomes.items())
    return PAGE.format(
        version=SGLANG_VERSION,
        counts=f"Of {len(rows)} fields: {counts}",
        tables="\n\n".join(tables),
        passed=both,
        all=cases,
        kits="\n".join(lines),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    text = page()
    if parser.parse_args().check:
        return int(DOCUMENT.read_text() != text)
    DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
