"""Write the tables of docs/sglang-seams.md from the code that they describe.

    python scripts/seams_doc.py            write them
    python scripts/seams_doc.py --check    exit code 1 if they are stale

A table stands between `<!-- NAME -->` and `<!-- end -->`; everything else is written by hand.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from sglang_hma.launch.environment import NOISY, VARIABLES
from sglang_hma.seam_list import PLUGIN_POINTS, SEAMS
from sglang_hma.seams import SGLANG_VERSION

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "sglang_hma"
DOCUMENT = ROOT / "docs" / "sglang-seams.md"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def points() -> str:
    rows = ((point.point, point.ours, point.reason) for point in PLUGIN_POINTS)
    return table(("point", "what we give it", "why"), rows)


def hooks() -> str:
    rows = ((f"`{seam.target}`", seam.when, seam.reason) for seam in SEAMS)
    return table(("target", "when", "reason"), rows)


def overrides() -> str:
    return table(("class", "derives from", "overrides", "why"), sorted(overriding_classes()))


def overriding_classes() -> Iterator[tuple[str, str, str, str]]:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.ClassDef):
                continue
            methods = [
                f"`{method.name}`"
                for method in node.body
                if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
                and any(ast.unparse(mark) == "override" for mark in method.decorator_list)
            ]
            if methods:
                ours = f"`{file.relative_to(PACKAGE)}:{node.name}`"
                bases = ", ".join(f"`{ast.unparse(base)}`" for base in node.bases)
                yield ours, bases, ", ".join(methods), first_paragraph(node)


def first_paragraph(node: ast.ClassDef) -> str:
    """Of the docstring, as the end of a sentence in a cell."""
    text = ast.get_docstring(node)
    if not text:
        raise SystemExit(f"{node.name} overrides methods of SGLang: say why in its docstring")
    return " ".join(text.partition("\n\n")[0].split()).rstrip(".")


def variables() -> str:
    rows = [
        (
            f"`{variable.name}`",
            f"`{variable.value}`",
            ", ".join(filter(None, (variable.when, "" if variable.forced else "unless set"))),
            variable.why,
        )
        for variable in VARIABLES
    ]
    return table(("variable", "value", "when", "why"), rows)


def noisy() -> str:
    return "\n".join(f"- `{module}`" for module in NOISY)


TABLES = {
    "version": lambda: (
        f"Read at SGLang {SGLANG_VERSION}, which is pinned; another version stops "
        "the server at start."
    ),
    "plugin points": points,
    "hooks": hooks,
    "overrides": overrides,
    "variables": variables,
    "noisy": noisy,
}


def generated(text: str) -> str:
    """`text` with the content of every table replaced."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(found.findall(text)) != 1:
            raise SystemExit(f"{DOCUMENT.name} has no place for the table {begin.strip()}")
        block = f"{begin}{make()}\n{end}"
        text = found.sub(lambda _, block=block: block, text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    before = DOCUMENT.read_text()
    after = generated(before)
    if check and after != before:
        sys.stderr.write(f"docs/{DOCUMENT.name} is stale: run python scripts/seams_doc.py\n")
        return 1
    if not check:
        DOCUMENT.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
