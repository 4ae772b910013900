"""docs/troubleshooting.md has every message that the code has for people, and no other."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.source_messages import messages

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


def on_the_page() -> Iterator[str]:
    """The messages in the first cells of the tables, as they are in the code."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| it "):
            first = line.removeprefix("| ").partition(" | ")[0]
            assert not SPAN.sub("", first).replace("<br>", ""), f"more than messages: {first}"
            yield from (span[2].strip() for span in SPAN.finditer(first))


def test_every_message_is_on_the_page() -> None:
    there = set(on_the_page())
    missing = [f"{where}: {text}" for text, where in messages(ROOT).items() if text not in there]
    assert missing == []


def test_the_page_has_no_message_that_nobody_says() -> None:
    assert set(on_the_page()) - messages(ROOT).keys() == set()


def test_each_message_is_there_once() -> None:
    there = list(on_the_page())
    assert len(there) == len(set(there))


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ('raise ValueError("it is wrong")', {"it is wrong"}),
        ('raise TierError(f"{path!r} is {why}") from error', {"… is …"}),
        ('def f():\n log.warning("tier %s: %.1f of %d", a, b, c)', {"tier …: … of …"}),
        ('print(f"top: {error}", file=sys.stderr)', {"top: …"}),
        ('raise E("one" + f"{a}{b}" + ("two" if c else "three"))', {"one…two", "one…three"}),
        (
            'def f():\n why = "no" if a else "yes"\n raise E(f"{why} it is")',
            {"no it is", "yes it is"},
        ),
        ('NAME = "A_VARIABLE"\nraise E(f"set {NAME}")', {"set A_VARIABLE"}),
        ('FORMS = "one or two"\nraise E(f"write {FORMS}")', {"write …"}),
        ('def shortage():\n if a:\n  return None\n return f"{a} is short"', {"… is short"}),
        ('self._wrong(here, f"takes {a}")\nproblems.append("is bad")', {"takes …", "is bad"}),
        ('File(path, problems=[f"{a}cannot read"])', {"…cannot read"}),
        ('raise _Internal("reason")\nraise E(error)\nraise E(f"{a}: {b}")\nprint("fine")', set()),
    ],
)
def test_a_message_is_found_in_the_source(tmp_path: Path, source: str, texts: set[str]) -> None:
    (tmp_path / "tiers").mkdir()
    (tmp_path / "tiers" / "ours.py").write_text(source)
    assert messages(tmp_path).keys() == texts
