"""A few flags of a server, read as SGLang will read them, without SGLang.

Role and device must be known before SGLang is imported: `import sglang` alone settles the platform
(sglang.srt.utils.common asks for it), and takes seconds. So a parser of just the flags in question
reads them first, by SGLang's rules:

- argparse's: a flag may be shortened while it is unambiguous, `--flag=value` is `--flag value`, and
  the last value given counts;
- `--config FILE`, as two words, stands for the flags in a YAML file, before the whole command
  line.

A parser of a few flags takes an abbreviation that is ambiguous among all of SGLang's. SGLang's own
parser, which reads everything again later, refuses that.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

CONFIG = "--config"


class Refusal(Exception):
    """Why nothing starts, in one line: the flag, its value, the reason, the remedy."""


class Parser(argparse.ArgumentParser):
    """Raises Refusal where argparse prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise Refusal(message.removeprefix("argument "))


def parser_of(*flags: str, switches: Sequence[str] = ()) -> Parser:
    """A parser of `flags`, which take a value, and `switches`, which take none."""
    parser = Parser(add_help=False)
    parser.add_argument(CONFIG)
    for flag in flags:
        parser.add_argument(flag)
    for flag in switches:
        parser.add_argument(flag, nargs="?", const="true")
    return parser


def read(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """What `argv`, with its --config file, gives for the parser's flags; others are passed over.

    Raises Refusal for what argparse refuses, and for a file that SGLang would not read.
    """
    given, _ = parser.parse_known_args(with_file(argv))
    if given.config is not None:
        # SGLang looks for the two words, and takes any other spelling without a look at the file.
        raise Refusal(
            f"--config {given.config} would not be read: write it as two words, --config "
            f"{given.config}, not shortened and without '='"
        )
    return given


def with_file(argv: Sequence[str]) -> list[str]:
    """`argv` with the flags in its --config file before it, each as one word, --flag=value."""
    places = [place for place, word in enumerate(argv) if word == CONFIG]
    if not places:
        return list(argv)
    if len(places) > 1:
        raise Refusal("--config is given more than once: SGLang reads one file; merge them")
    (place,) = places
    if place + 1 == len(argv):
        raise Refusal("--config needs a file: --config FILE.yaml")
    return [*_flags_in(Path(argv[place + 1])), *argv[:place], *argv[place + 2 :]]


def _flags_in(path: Path) -> list[str]:
    import yaml

    if path.suffix.lower() not in (".yaml", ".yml"):
        raise Refusal(f"--config is {path}: SGLang reads YAML, name it FILE.yaml or FILE.yml")
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise Refusal(f"--config is {path}: {error.strerror}; give a file that exists") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise Refusal(f"--config is {path}: not YAML ({reason}): mend it") from None
    if content is None:
        return []
    if not isinstance(content, dict):
        raise Refusal(f"--config is {path}: give one flag a line, as in 'page-size: 32'")
    return [word for key, value in content.items() for word in _words(f"--{key}", value)]


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"{flag}={str(value).lower()}"]
    if isinstance(value, list):
        return [flag, *map(str, value)] if value else []
    return [f"{flag}={value}"]
