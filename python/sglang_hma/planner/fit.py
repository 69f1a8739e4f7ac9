"""Step times from recorded runs of one prefill and one decode instance.

Decode steps are seen: between two tokens of a request lies one, and the other requests' tokens tell
its batch. Prefill passes are not: their times are those with which the simulator gives the recorded
TTFT, by Gauss and Newton's method with weights and a search around its answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from sglang_hma.planner.measured import DecodeTimes, Measured, PrefillTimes
from sglang_hma.planner.recorded import Run, RunError
from sglang_hma.planner.replay import Pair

Array = npt.NDArray[np.float64]

ROUNDS = 20
STEP = 0.02
"""Of a derivative, as a share of the mean TTFT."""
LARGE = 0.1
"""Of a logarithm: an error from which on it counts as itself and not as its square."""
SETTLED = 1e-3
"""A round that makes the error smaller by less than this share of it is the last one."""
TURNS = 8
"""Of both methods."""
EXACT = 1e-6
"""Of a logarithm: errors that need no better values."""
COARSE = (4.0, 1.0, 0.25, 0.06, 0.015)
"""Steps of the search that follows, by that of a derivative."""


def fit(runs: Sequence[Run], pair: Pair, source: str) -> Measured:
    """Raises RunError where no request of the runs has a second token, later than its first."""
    return _prefill(runs, pair, Measured(source, PrefillTimes(0, 0, 0), _decode(runs)))


def _decode(runs: Sequence[Run]) -> DecodeTimes:
    """Least squares over the gaps between tokens."""
    found = [_steps(run) for run in runs]
    batches, gaps = (np.concatenate(part) for part in zip(*found, strict=True))
    if not gaps.sum() > 0:
        raise RunError("no request of these runs has a later token: decode has nothing to fit")
    return DecodeTimes(*map(float, nonnegative(batches, gaps)))


def _steps(run: Run) -> tuple[Array, Array]:
    """Of each gap between two tokens: (1, requests that decode, tokens they see), and its length.

    What decodes in the middle of it was in the batch.
    """
    tokens = [
        np.array(list(accumulate(gaps, initial=request.arrival_s + ttft)))
        for request, ttft, gaps in zip(run.requests, run.ttft_s, run.gaps_s, strict=True)
    ]
    prompts = np.array([request.input_tokens for request in run.requests], dtype=float)
    made = np.array([len(times) for times in tokens], dtype=float)
    middles = np.concatenate([(times[1:] + times[:-1]) / 2 for times in tokens])
    gaps = np.concatenate([np.diff(times) for times in tokens])
    joined = _sums([times[0] for times in tokens], np.stack([np.ones_like(prompts), prompts]))
    left = _sums([times[-1] for times in tokens], np.stack([np.ones_like(prompts), prompts + made]))
    every = np.concatenate(tokens)
    generated = _sums(every, np.ones((1, len(every))))
    (begun, known), (over, gone) = joined(middles), left(middles)
    batch = begun - over
    seen = known + generated(middles)[0] - gone
    return np.stack([np.ones_like(batch), batch, seen], axis=1), gaps


def _sums(times: "Sequence[float] | Array", values: Array) -> "Sums":
    order = np.argsort(times)
    totals = np.concatenate([np.zeros((len(values), 1)), values[:, order].cumsum(axis=1)], axis=1)
    return Sums(np.asarray(times)[order], totals)


@dataclass(frozen=True)
class Sums:
    """Of values that come at moments: what has come until another moment."""

    times: Array
    totals: Array

    def __call__(self, moments: Array) -> Array:
        found: Array = self.totals[:, np.searchsorted(self.times, moments)]
        return found


def _prefill(runs: Sequence[Run], pair: Pair, times: Measured) -> Measured:
    """The TTFT that are simulated by those that were recorded: their logarithms, by Huber's loss.

    One request that goes before a long prompt in one of them and behind it in the other is off by
    many times its TTFT; squares would have all others follow it.
    """
    recorded = np.concatenate([run.ttft_s for run in runs])

    def simulated(values: Array) -> Array:
        trial = _with(times, values)
        return np.array([job.ttft_s for run in runs for job in pair.replay(trial, run.requests)])

    def errors(found: Array) -> Array:
        result: Array = np.log(found / recorded)
        return result

    features = np.concatenate([_features(run) for run in runs])
    # Half of what no token explains may be the pass's and half around it, until a queue tells.
    first = nonnegative(features / recorded[:, None], np.ones_like(recorded))
    values = np.array([first[0] / 2, first[1], first[2], first[0] / 2])
    steps = STEP * recorded.mean() / np.append(features.mean(axis=0), 1.0)

    def loss(at: Array) -> float:
        return huber(errors(simulated(at)))

    exact = EXACT**2 / 2 * len(recorded)
    for turn in range(TURNS):
        # Nearer to the answer, a smaller step has requests change places less often.
        values = _newton(lambda at: errors(simulated(at)), values, steps / 4**turn)
        values = compass(loss, values, steps, exact=exact)
        if loss(values) < exact:
            break
    return _with(times, values)


def _newton(errors: Callable[[Array], Array], values: Array, steps: Array) -> Array:
    found = errors(values)
    for _ in range(ROUNDS):
        slopes = np.stack(
            [(errors(values + move) - found) / move.sum() for move in np.diag(steps)], axis=1
        )
        weights = 1 / np.sqrt(np.maximum(1.0, np.abs(found) / LARGE))
        aim = nonnegative(slopes * weights[:, None], (slopes @ values - found) * weights)
        for part in (1.0, 0.5, 0.25, 0.125):
            trial = values + part * (aim - values)
            there = errors(trial)
            if huber(there) < huber(found):
                break
        else:
            break
        gain = 1 - huber(there) / huber(found)
        values, found = trial, there
        if gain < SETTLED:
            break
    return values


def compass(loss: Callable[[Array], float], start: Array, steps: Array, *, exact: float) -> Array:
    """The nonnegative values around `start` with the least loss: they are moved by their steps,
    each alone and each against another, as long as that helps and the loss is above `exact`; then
    by smaller ones (after Hooke and Jeeves, 1961).

    Slopes lead to where they vanish, and the loss jumps wherever two requests change places. What
    one value explains, another explains nearly as well.
    """
    alone = np.diag(steps)
    against = [one - other for i, one in enumerate(alone) for other in alone[:i]]
    values, least = start, loss(start)
    for part in COARSE:
        improved = True
        while improved and least > exact:
            improved = False
            for move in [*alone, *against]:
                for trial in (values + part * move, values - part * move):
                    trial = np.maximum(trial, 0.0)
                    if (there := loss(trial)) < least * (1 - SETTLED):
                        values, least, improved = trial, there, True
                        break
    return values


def huber(errors: Array) -> float:
    """Half the square of an error up to LARGE, a straight line beyond it (Huber, 1964)."""
    sizes = np.abs(errors)
    return float(np.where(sizes < LARGE, sizes**2 / 2, LARGE * (sizes - LARGE / 2)).sum())


def _features(run: Run) -> Array:
    """Of each prompt computed alone: passes, tokens, pairs of which one sees the other."""
    tokens = np.array([request.input_tokens for request in run.requests], dtype=float)
    return np.stack([np.ones_like(tokens), tokens, tokens * (tokens + 1) / 2], axis=1)


def _with(times: Measured, values: Array) -> Measured:
    *prefill, overhead = map(float, values)
    return Measured(times.source, PrefillTimes(*prefill), times.decode, overhead)


def nonnegative(matrix: Array, right: Array) -> Array:
    """Least squares without negative answers: what would be one is left out, the worst first."""
    scale = np.maximum(np.abs(matrix).mean(axis=0), np.finfo(float).tiny)
    kept = list(range(matrix.shape[1]))
    while kept:
        answer = np.linalg.lstsq(matrix[:, kept] / scale[kept], right)[0]
        worst = int(answer.argmin())
        if answer[worst] >= 0:
            break
        del kept[worst]
    result = np.zeros(matrix.shape[1])
    if kept:
        result[kept] = answer / scale[kept]
    return result
