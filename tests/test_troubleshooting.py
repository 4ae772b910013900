"""docs/troubleshooting.md lists every message of the source, once, and no other message."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.source_messages import messages

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


def page_messages() -> Iterator[str]:
    """Yield the messages in the first cells of the tables that begin with "| message"."""
    in_table = False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            in_table = False
        elif line.startswith("| message "):
            in_table = True
        elif in_table and line.startswith("| "):
            cell = line.removeprefix("| ").partition(" | ")[0]
            assert not CODE.sub("", cell).replace("<br>", ""), f"text beside messages: {cell}"
            yield from (code[2].strip() for code in CODE.finditer(cell))


def test_page_lists_every_message_of_the_source() -> None:
    listed = set(page_messages())
    missing = [f"{where}: {text}" for text, where in messages(ROOT).items() if text not in listed]
    assert missing == []


def test_page_lists_no_message_that_the_source_lacks() -> None:
    assert set(page_messages()) - messages(ROOT).keys() == set()


def test_page_lists_each_message_once() -> None:
    listed = list(page_messages())
    assert len(listed) == len(set(listed))


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
        ('self._add_problem(here, f"takes {a}")\nproblems.append("is bad")', {"takes …", "is bad"}),
        ('ProfileFile(path, problems=[f"{a}cannot read"])', {"…cannot read"}),
        ('raise _Internal("reason")\nraise E(error)\nraise E(f"{a}: {b}")\nprint("fine")', set()),
    ],
)
def test_messages_of_a_module_are_its_texts_for_people(
    tmp_path: Path, source: str, texts: set[str]
) -> None:
    (tmp_path / "tiers").mkdir()
    (tmp_path / "tiers" / "module.py").write_text(source)
    assert messages(tmp_path).keys() == texts
