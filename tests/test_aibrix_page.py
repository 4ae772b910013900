"""docs/aibrix.md has the table of variables with the texts of the code."""

from pathlib import Path

from kvcache.profiles import aibrix

PAGE = Path(__file__).resolve().parent.parent / "docs" / "aibrix.md"


def rows() -> list[str]:
    """The rows that the page must have: one per effect and reason."""
    effects = {aibrix.MappedVariable: "used", aibrix.NoEffect: "no effect"}
    names_by_text: dict[tuple[str, str], list[str]] = {}
    for name, entry in aibrix.VARIABLES.items():
        names_by_text.setdefault((effects[type(entry)], entry.text), []).append(f"`{name}`")
    return [
        f"| {', '.join(names)} | {effect} | {text} |"
        for (effect, text), names in names_by_text.items()
    ]


def test_page_has_a_row_for_every_variable() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert lines[lines.index("| variable | effect | |") + 2 :] == rows()
