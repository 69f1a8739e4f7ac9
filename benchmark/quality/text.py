"""Text that every Python machine has: the language reference behind help(), then the docstrings of
the standard library. It is read where it lies."""

import ast
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

STANDARD_LIBRARY = Path(os.__file__).parent


def reference() -> Iterator[str]:
    """help()'s topics, each paragraph once: topics repeat one another."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics):
        paragraphs = []
        for paragraph in topics[name].split("\n\n"):
            if paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        yield "\n\n".join(paragraphs)


def docstrings() -> Iterator[str]:
    """Of each module of the standard library, in the order of their names."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for source in sorted(STANDARD_LIBRARY.glob("*.py")):
        tree = ast.parse(source.read_text(encoding="utf-8", errors="ignore"))
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


HELD_OUT = 20  # one source file in so many is kept from training
NOT_TEXT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}


def sources(*, held_out: bool, library: Path = STANDARD_LIBRARY) -> Iterator[str]:
    """Files of the standard library: those that train.py learns from, or the others. Which is
    which depends on a file's path alone."""
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        kept_back = zlib.crc32(name.as_posix().encode()) % HELD_OUT == 0
        if kept_back == held_out and NOT_TEXT.isdisjoint(name.parts):
            yield path.read_text(encoding="utf-8", errors="ignore")


def prose() -> Iterator[str]:
    yield from reference()
    yield from docstrings()


def windows(texts: Iterable[str], tokenizer: Any, tokens: int, count: int) -> list[list[int]]:
    """`count` documents of `tokens` token ids each, one after the other in the text.

    Raises ValueError if the text is too short for so many.
    """
    found: list[list[int]] = []
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False)
        while len(ids) >= tokens and len(found) < count:
            found.append(ids[:tokens])
            del ids[:tokens]
        if len(found) == count:
            return found
    raise ValueError(f"the text has only {len(found)} documents of {tokens} tokens, not {count}")
