"""Flags that are read without SGLang: by SGLang's rules, held against its own parser."""

from pathlib import Path

import pytest

from sglang_hma.launch.arguments import early_parser, full_parser
from sglang_hma.launch.flags import Parser, Refusal, parser_of, read
from sglang_hma.launch.pd_checks import (
    ASKED,
    NOT_FOR_ONE_ROLE,
    NOT_HERE,
    SWITCHES,
    servers_flags,
)

VALUES = {
    "--disaggregation-mode": "decode",
    "--device": "cpu",
    "--hma-kv-format": "native",
    "--hma-weight-format": "native",
    "--hma-prefill-runtime": "reference",
    "--hma-layers-per-send": "3",
    "--hma-kv-checksum": "off",
    "--hma-mesh": "1x2",
}
VALUED = [flag for flag in NOT_HERE | NOT_FOR_ONE_ROLE if flag not in SWITCHES]
READERS = {
    "launch_server": early_parser,
    "launch_pd": servers_flags,
    "launch_pd's refusals": lambda: parser_of(*VALUED),
}


@pytest.fixture(scope="module")
def sglangs() -> Parser:
    return full_parser()


@pytest.mark.parametrize("reader", READERS)
def test_sglang_reads_the_same_or_refuses(reader: str, sglangs: Parser) -> None:
    """Every flag, shortened in every way."""
    model = ["--model-path", "m"]
    untouched = vars(sglangs.parse_args(model))
    parser = READERS[reader]()
    nothing = read(parser, [])
    shortened = 0
    for flag in parser._option_string_actions:
        if flag == "--config":
            continue
        value = VALUES.get(flag, "7")
        for end in range(len("--a"), len(flag) + 1):
            try:
                found = vars(sglangs.parse_args([*model, flag[:end], value]))
            except Refusal as refusal:
                assert str(refusal).startswith(("ambiguous option", "expected one argument"))
                assert end < len(flag)
                continue
            changed = {name for name in found if found[name] != untouched[name]}
            dest = sglangs._option_string_actions[flag].dest
            assert changed == {dest}, (flag[:end], changed)
            assert read(parser, [flag[:end], value]) != nothing
            shortened += end < len(flag)
    assert shortened > 20


def test_all_spellings_of_what_launch_pd_asks(sglangs: Parser) -> None:
    for field, names in ASKED.items():
        (action,) = (action for action in sglangs._actions if action.dest == field)
        assert set(action.option_strings) == set(names)
    for flag in [*NOT_HERE, *NOT_FOR_ONE_ROLE]:
        assert flag in sglangs._option_string_actions
        takes_none = sglangs._option_string_actions[flag].nargs == 0
        assert takes_none == (flag in SWITCHES)


def write(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return ["--config", str(path)]


def test_a_file_stands_before_the_command_line(tmp_path: Path) -> None:
    argv = write(tmp_path / "a.yml", "tp-size: 2\npage-size: 64\napi-key: secret\nother: [1, 2]\n")
    given = read(servers_flags(), ["--page-size", "32", *argv])
    assert (given.tp_size, given.page_size, given.api_key) == ("2", "32", "secret")
    assert read(servers_flags(), write(tmp_path / "b.yaml", "")).tp_size is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config"], ["--config needs a file"]),
        (["--config", "a.yaml", "--config", "b.yaml"], ["more than once"]),
        (["--config=a.yaml"], ["two words", "--config a.yaml"]),
        (["--conf", "a.yaml"], ["two words", "--config a.yaml"]),
        (["--config", "a.json"], ["--config is a.json", "YAML"]),
        (["--config", "no/such/a.yaml"], ["--config is no/such/a.yaml", "No such file"]),
        (["--tp-size"], ["--tp-size", "expected one argument"]),
    ],
)
def test_refusals(argv: list[str], words: list[str]) -> None:
    with pytest.raises(Refusal) as refused:
        read(servers_flags(), argv)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words\n"])
def test_files_that_hold_no_flags(text: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:
        read(servers_flags(), write(tmp_path / "a.yaml", text))
    message = str(refused.value)
    assert message.startswith("--config is") and "\n" not in message
