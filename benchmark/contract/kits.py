"""SGLang's own test cases of what clients see, from the installed package, on any URL.

python -m benchmark.contract.kits URL MODEL [--only KIT]: a line of JSON for each case, and what
became of it.
"""

import argparse
import contextlib
import importlib
import io
import json
import unittest
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

KITS = (
    *("basic_api_contract_kit.BasicAPIContractMixin", "matched_stop_kit.MatchedStopMixin"),
    *("basic_decode_correctness_kit.BasicDecodeCorrectnessMixin",),
    *("basic_scheduler_stress_kit.BasicSchedulerStressMixin",),
    *("ebnf_constrained_kit.EBNFConstrainedMixin", "json_mode_kit.JSONModeMixin"),
    *("json_constrained_kit.JSONConstrainedMixin", "regex_constrained_kit.RegexConstrainedMixin"),
    *("spec_server_kits.SpecLogprobKit", "spec_server_kits.SpecPenaltyKit"),
    *("spec_server_kits.SpecGrammarKit", "spec_server_kits.SpecFeatureKit"),
    *("anthropic_messages_kit.AnthropicMessagesMixin",),
)
PASSED = "passed"


def outcomes(kit: str, url: str, model: str) -> Iterator[tuple[str, str]]:
    """Names of a kit's cases, and PASSED or the last line of what went wrong."""
    module, _, name = kit.partition(".")
    mixin = getattr(importlib.import_module(f"sglang.test.kits.{module}"), name)
    alive = SimpleNamespace(poll=lambda: None, pid=0)
    given = {"base_url": url, "model": model, "api_key": "none", "process": alive}
    case: Any = type(name, (mixin, unittest.TestCase), given)
    if name == "JSONModeMixin":
        import openai

        case.client = openai.Client(api_key="none", base_url=f"{url}/v1")
    for test in unittest.defaultTestLoader.getTestCaseNames(case):
        result = unittest.TestResult()
        with contextlib.redirect_stdout(io.StringIO()):
            case(test).run(result)
        wrong = [text for _, text in (*result.failures, *result.errors)]
        lines = wrong[0].strip().splitlines() if wrong else [PASSED]
        yield test, lines[-1][:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--only", choices=KITS)
    given = parser.parse_args()
    for kit in [given.only] if given.only else KITS:
        try:
            for test, outcome in outcomes(kit, given.url, given.model):
                print(json.dumps([kit, test, outcome]), flush=True)
        except ImportError as error:
            print(json.dumps([kit, "", f"not run: {error}"]), flush=True)


if __name__ == "__main__":
    main()
