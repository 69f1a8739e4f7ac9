"""Whether what we override in SGLang is still there, and is still called as we expect.

Every method of ours that replaces one of SGLang's carries `@override`. `broken` looks at each of
them, in every class of ours that is loaded and derives from one of SGLang's: the base must have
the method, and ours must take each call that the base's signature allows.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter
from typing import Any

PLACED = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
REST = {Parameter.VAR_POSITIONAL: "*args", Parameter.VAR_KEYWORD: "**kwargs"}


def broken() -> list[str]:
    """One entry an override that SGLang no longer calls, or calls in another way."""
    return [
        f"{cls.__module__}.{cls.__qualname__}.{name}: {reason}"
        for cls in classes()
        for name, ours in marked(cls)
        if (reason := _why_broken(cls, name, ours)) is not None
    ]


def classes() -> list[type]:
    """Loaded classes of ours that have a base in SGLang."""
    return [
        value
        for name, module in sorted(sys.modules.items())
        if name.partition(".")[0] == "sglang_hma"
        for value in list(vars(module).values())
        if isinstance(value, type) and value.__module__ == name and sglang_bases(value)
    ]


def sglang_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "sglang"]


def marked(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The methods that `cls` itself marks as overrides."""
    for name, member in vars(cls).items():
        if getattr(member, "__override__", False):
            yield name, member


def _why_broken(cls: type, name: str, ours: Callable[..., Any]) -> str | None:
    bases = sglang_bases(cls)
    base = next((base for base in bases if name in vars(base)), None)
    if base is None:
        return f"{bases[0].__module__}.{bases[0].__qualname__} has no such method"
    reason = mismatch(vars(base)[name], ours)
    return f"{base.__module__}.{base.__qualname__}.{name} {reason}" if reason else None


def mismatch(theirs: Any, ours: Callable[..., Any], extra: int = 0) -> str | None:
    """Why a call that `theirs` takes could fail with `ours`, or None.

    - A parameter that theirs takes by position, ours takes in the same place; one that it takes by
      name, ours takes by that name. `*args` and `**kwargs` of ours take any.
    - What may be left out of theirs may be left out of ours; `*args` and `**kwargs` of theirs must
      be in ours.
    - What only ours has needs a default, or comes in theirs' `**kwargs`.

    `extra`: how many leading parameters of ours are not SGLang's to give.
    """
    theirs = getattr(theirs, "__func__", theirs)  # of a class method
    if not callable(theirs):
        return f"is a {type(theirs).__name__}, not a method"
    base = list(inspect.signature(theirs).parameters.values())
    own = list(inspect.signature(ours).parameters.values())[extra:]
    if base and base[0].name in ("self", "cls"):
        base, own = base[1:], own[1:]
    return _misplaced(base, own) or _misnamed(base, own) or _missing(base, own)


def _misplaced(base: Sequence[Parameter], own: Sequence[Parameter]) -> str | None:
    takes_any = any(p.kind is Parameter.VAR_POSITIONAL for p in own)
    places = [p for p in own if p.kind in PLACED]
    for place, theirs in enumerate(p for p in base if p.kind in PLACED):
        if place >= len(places):
            if not takes_any:
                return f"takes {theirs.name} by position, ours does not"
        elif theirs.kind in NAMED and theirs.name != places[place].name:
            return f"has {theirs.name} where ours has {places[place].name}"
    return None


def _misnamed(base: Sequence[Parameter], own: Sequence[Parameter]) -> str | None:
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in own)
    names = {p.name: p for p in own if p.kind in NAMED}
    for theirs in base:
        mine = names.get(theirs.name)
        if mine is None:
            if theirs.kind in NAMED and not takes_any:
                return f"takes {theirs.name} by name, ours does not"
        elif mine.default is Parameter.empty and theirs.default is not Parameter.empty:
            return f"lets {theirs.name} be left out, ours does not"
    return None


def _missing(base: Sequence[Parameter], own: Sequence[Parameter]) -> str | None:
    own_kinds, names = {p.kind for p in own}, {p.name for p in base}
    for theirs in base:
        if theirs.kind in REST and theirs.kind not in own_kinds:
            return f"takes {REST[theirs.kind]}, ours does not"
    if any(p.kind is Parameter.VAR_KEYWORD for p in base):
        return None
    for mine in own:
        if mine.kind not in REST and mine.default is Parameter.empty and mine.name not in names:
            return f"has no {mine.name}, which ours needs"
    return None
