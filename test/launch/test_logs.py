from pathlib import Path

import pytest

from sglang_hma.launch.logs import KEPT_BEFORE, LogFile, default_dir


def test_rotates_by_size_and_keeps_the_end(tmp_path: Path) -> None:
    path = tmp_path / "decode-0.log"
    log = LogFile(path, max_bytes=1000)
    lines = [f"line {i} 100% of {{it}}" for i in range(500)]
    for line in lines:
        log.line(line)
    log.close()
    files = sorted(tmp_path.iterdir(), reverse=True)
    assert len(files) == 1 + KEPT_BEFORE and all(file.stat().st_size <= 1000 for file in files)
    kept = [line for file in files for line in file.read_text().splitlines()]
    assert kept == lines[-len(kept) :]


def test_earlier_starts_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    words = [f"crash {i}" for i in range(KEPT_BEFORE + 3)]
    for word in words:
        log = LogFile(path)
        log.line(word)
        log.close()
    assert path.read_text().splitlines() == words
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log = LogFile(Path("/dev/full"))
    log.line("lost")
    assert capsys.readouterr().err == ""


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_dir(30000) == Path("/state/sglang-hma/logs/30000")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_dir(1) == Path("/home/me/.local/state/sglang-hma/logs/1")
