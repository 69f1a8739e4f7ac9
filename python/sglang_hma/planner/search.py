"""Which mixes can be bought, and what each of them is good for."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from sglang_hma.planner import goodput, parallel
from sglang_hma.planner.catalogue import Catalogue
from sglang_hma.planner.goodput import Goodput, Objectives, Trial
from sglang_hma.planner.journal import Journal, key_of
from sglang_hma.planner.model_shape import ModelShape
from sglang_hma.planner.simulation.fleet import Policy
from sglang_hma.planner.systems import COLOCATED, Offer, Site, System, offer
from sglang_hma.planner.trace import Request


@dataclass(frozen=True)
class Budget:
    """What a fleet may cost; None: no limit."""

    usd: float | None = None
    watts: float | None = None
    instances: int | None = None

    def allows(self, offer: Offer) -> bool:
        return not (
            (self.usd is not None and offer.price_usd > self.usd)
            or (self.watts is not None and offer.watts > self.watts)
            or (self.instances is not None and offer.prefill + offer.decode > self.instances)
        )


@dataclass(frozen=True)
class Question:
    """How well each mix does is measured for."""

    requests: Sequence[Request]
    objectives: Objectives
    seeds: int = 3
    count: int = 2000
    tolerance: float = 0.02
    policy: Policy = "power_of_two"

    def ask(self, offer: Offer) -> Goodput:
        return goodput.of(
            offer.fleet,
            self.requests,
            self.objectives,
            seeds=self.seeds,
            count=self.count,
            tolerance=self.tolerance,
            policy=self.policy,
        )

    def trial(self, offer: Offer, seed: int) -> Trial:
        """Of one excerpt of the trace."""
        return Trial(
            offer.fleet, self.requests, self.objectives, seed, self.count, policy=self.policy
        )


@dataclass(frozen=True)
class Answer:
    offer: Offer
    goodput: Goodput

    @property
    def per_dollar(self) -> float:
        """Requests a second for a thousand dollars."""
        return self.goodput.rate / self.offer.price_usd * 1000


def mixes(
    catalogue: Catalogue, shape: ModelShape, site: Site, system: System, budget: Budget
) -> Iterator[Offer]:
    """Every mix within the budget that cannot be widened in prefill at the same decode, and the
    narrower ones by powers of two.

    Raises CatalogueError, DoesNotFit.
    """
    decode = 0
    while True:
        decode += 1
        least = offer(catalogue, shape, site, system, 0 if system in COLOCATED else 1, decode)
        if not budget.allows(least):
            return
        if system in COLOCATED:
            yield least
            continue
        most = 1
        while budget.allows(offer(catalogue, shape, site, system, most + 1, decode)):
            most += 1
        widths = {most, *(2**n for n in range(most.bit_length()))}
        for prefill in sorted(widths):
            yield offer(catalogue, shape, site, system, prefill, decode)


def ask(
    question: Question,
    offers: Iterable[Offer],
    *,
    processes: int | None = None,
    heard: Callable[[Answer], object] = lambda _: None,
    journal: Journal | None = None,
) -> list[Answer]:
    """In the order of the offers, whichever is done first.

    What the journal knows is not asked again; each answer is written there when it is heard.
    """
    asked = [(question, each) for each in offers]
    return ask_each(asked, processes=processes, heard=heard, journal=journal)


def ask_each(
    asked: Sequence[tuple[Question, Offer]],
    *,
    processes: int | None = None,
    heard: Callable[[Answer], object] = lambda _: None,
    journal: Journal | None = None,
) -> list[Answer]:
    """As `ask`, where questions differ."""
    questions = list({id(question): question for question, _ in asked}.values())
    place_of = {id(question): place for place, question in enumerate(questions)}
    texts = [repr(question) for question in questions] if journal else []
    items = [(place_of[id(question)], each) for question, each in asked]
    keys = [key_of(texts[place], each.fleet) for place, each in items] if journal else []
    found: dict[int, Answer] = {}

    def hear(index: int, result: Goodput) -> None:
        found[index] = Answer(items[index][1], result)
        heard(found[index])

    unknown = []
    for index in range(len(items)):
        known = journal.get(keys[index]) if journal else None
        if known is None:
            unknown.append(index)
        else:
            hear(index, known)

    def learn(at: int, result: Goodput) -> None:
        if journal:
            journal.put(keys[unknown[at]], result)
        hear(unknown[at], result)

    left = [items[index] for index in unknown]
    parallel.each(partial(_answer, questions), left, processes=processes, heard=learn)
    return [found[index] for index in range(len(items))]


def _answer(questions: Sequence[Question], item: tuple[int, Offer]) -> Goodput:
    place, offer = item
    return questions[place].ask(offer)
