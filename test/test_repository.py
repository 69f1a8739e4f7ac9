"""What the documents say of the repository is true, and files stay short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def tree_paths(block: str) -> list[str]:
    """Paths of an indented tree, two spaces a level, each followed by what it is for."""
    folders: list[str] = []
    found = []
    for line in block.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        found.append("".join([*folders[:depth], name]))
        folders[depth:] = [name]
    return found


def named_paths() -> list[str]:
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", ARCHITECTURE, re.DOTALL)
    inline = re.findall(r"`([a-z_]+/[\w./-]*)`", ARCHITECTURE)
    return sorted({*tree_paths(tree), *inline})


@pytest.mark.parametrize("path", named_paths())
def test_architecture_names_what_exists(path: str) -> None:
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_every_package_is_in_the_architecture() -> None:
    for package in ("hma_kernels", "python/sglang_hma"):
        for init in (ROOT / package).glob("*/__init__.py"):
            assert f"{init.parent.relative_to(ROOT)}/" in named_paths()


LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


@pytest.mark.parametrize("document", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    for target, _ in LINK.findall(document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


SOURCES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".sh"}
FOLDERS = ("python", "hma_kernels", "benchmark", "test", "scripts")


def test_no_source_file_is_over_400_lines() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in files
        if path.suffix in SOURCES
    }
    assert len(lengths) > 100
    assert {path: lines for path, lines in lengths.items() if lines > 400} == {}
