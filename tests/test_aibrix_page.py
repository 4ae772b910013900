"""docs/aibrix.md has the whole table, in the words of the code."""

from pathlib import Path

from kvcache.profiles import aibrix

PAGE = Path(__file__).resolve().parent.parent / "docs" / "aibrix.md"


def rows() -> list[str]:
    """The table's rows as the page should have them."""
    fates = {aibrix.Taken: "taken", aibrix.NoEffect: "no effect"}
    return [
        f"| `{name}` | {fates[type(entry)]} | {entry.says} |"
        for name, entry in aibrix.VARIABLES.items()
    ]


def test_the_page_has_every_variable() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert lines[lines.index("| variable | | |") + 2 :] == rows()
