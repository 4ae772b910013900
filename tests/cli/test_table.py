"""Columns of tables line up; text has colours only on a terminal."""

import io

import pytest

from kvcache.cli.table import BOLD, painter, render

PLAIN = painter(io.StringIO())

GROUPS = [("", ["turn"]), ("a long title", ["x", "y"]), ("b", ["long name"])]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_render_lines_up_columns() -> None:
    rows = [["1", "10 ms", "2", "3"], ["20", "1 ms", "200", "30,000"]]
    assert render(GROUPS, rows, paint=PLAIN, strong="b").splitlines() == [
        "        a long title        b",
        "turn          x    y    long name",
        "----    ------------    ---------",
        "   1      10 ms    2            3",
        "  20       1 ms  200       30,000",
    ]


def test_render_strong_group_is_bold_on_a_terminal_and_lines_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows = [["1", "2", "3", "4"]]
    coloured = render(GROUPS, rows, paint=painter(Terminal()), strong="b")
    assert coloured.count("\x1b[1m") == 4
    bare = coloured.replace("\x1b[1m", "").replace("\x1b[0m", "")
    plain = render(GROUPS, rows, paint=PLAIN, strong="b")
    assert [line.rstrip() for line in bare.splitlines()] == plain.splitlines()


def test_painter_with_no_color_returns_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert painter(Terminal())("text", BOLD) == "text"
