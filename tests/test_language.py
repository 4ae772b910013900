"""The wording rules of the source, the tests and the pages that a test can check.

* A class name is defined once in the published source.
* A log message is a literal that begins with "kvcache: " and is logged in one place only, so that
  a search for it finds the code.
* No prose names an unnamed person where it should name a part (`FORBIDDEN`).
"""

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ("kvcache", "tiers", "profiles", "connectors")
OTHER_PYTHON = ("docs", "tests")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md")

FORBIDDEN = re.compile(
    r"(?<![^\W_])(?:who|whom|whose|nobody|somebody|anybody|told)(?![^\W_])", re.IGNORECASE
)
PREFIX = "kvcache: "
LOGGERS = {"log", "logger", "_log"}
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}


class Finding(NamedTuple):
    """A place that breaks a rule."""

    file: str
    line: int
    problem: str


def python_files(root: Path, *folders: str) -> Iterator[tuple[str, str]]:
    """The name and text of each Python file; rglob does not follow the links in kvcache/."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def repeated(places: dict[str, list[tuple[str, int]]], what: str) -> Iterator[Finding]:
    """A finding for each place of a text that has several places."""
    for text, found in places.items():
        for file, line in found if len(found) > 1 else ():
            yield Finding(file, line, f"{what} {text!r} is in {len(found)} places")


def class_findings(root: Path) -> Iterator[Finding]:
    places: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for file, text in python_files(root, *SOURCE):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append((file, node.lineno))
    return repeated(places, "class")


def log_arguments(tree: ast.AST) -> Iterator[ast.expr]:
    """The message argument of each logging call."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(name) | ast.Attribute(attr=name), attr=level),
                args=[first, *rest],
            ) if name in LOGGERS:
                if level in LEVELS:
                    yield first
                elif level == "log" and rest:
                    yield rest[0]


def log_findings(root: Path) -> Iterator[Finding]:
    places: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for file, text in python_files(root, *SOURCE):
        for argument in log_arguments(ast.parse(text)):
            match argument:
                case ast.Constant(str(message)) if message.startswith(PREFIX):
                    places[message].append((file, argument.lineno))
                case ast.Constant(str(message)):
                    yield Finding(file, argument.lineno, f"{message!r} lacks {PREFIX!r}")
                case _:
                    yield Finding(file, argument.lineno, "a log message is not a literal")
    yield from repeated(places, "log message")


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that a piece of source defines, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name):
                yield node.lineno, name
            case ast.Name(id=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name


def strings(tree: ast.AST, *, docstrings_only: bool) -> Iterator[tuple[int, str]]:
    """The string literals of a piece of source, with their lines.

    A docstring is a string that stands alone as a statement: also the one below a constant.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Expr(ast.Constant(str(text))) if docstrings_only:
                yield node.lineno, text
            case ast.Constant(str(text)) if not docstrings_only:
                yield node.lineno, text


def comments(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def word_findings(root: Path) -> Iterator[Finding]:
    """Forbidden words. Outside of `SOURCE`, strings are data, except for docstrings."""
    for folder in (*SOURCE, *OTHER_PYTHON):
        for file, text in python_files(root, folder):
            tree = ast.parse(text)
            found = [*names(tree), *comments(text)]
            found += strings(tree, docstrings_only=folder not in SOURCE)
            yield from forbidden(file, found)
    for pattern in PAGES:
        for path in sorted(root.glob(pattern)):
            lines = path.read_text(encoding="utf-8").splitlines()
            yield from forbidden(path.relative_to(root).as_posix(), list(enumerate(lines, 1)))


def forbidden(file: str, texts: list[tuple[int, str]]) -> Iterator[Finding]:
    for line, text in sorted(texts):
        for word in FORBIDDEN.finditer(text):
            at = line + text.count("\n", 0, word.start())
            yield Finding(file, at, f"has the word {word[0]!r}")


@cache
def findings(root: Path) -> list[Finding]:
    """All places under `root` that break a rule, by file and line."""
    return sorted([*class_findings(root), *log_findings(root), *word_findings(root)])


def test_source_tests_and_pages_keep_the_rules() -> None:
    assert list(findings(ROOT)) == []


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("tiers/a.py", "class One: ...\ndef f():\n  class One: ...", "class 'One' is in 2 places"),
        ("tiers/a.py", 'log.info("tier %s", a)', "'tier %s' lacks 'kvcache: '"),
        ("tiers/a.py", "log.log(level, text)", "a log message is not a literal"),
        (
            "tiers/a.py",
            'log.info("kvcache: a: b")\nself._log.error("kvcache: a: b")',
            "log message 'kvcache: a: b' is in 2 places",
        ),
        ("profiles/a.py", '"""Returns.\n\nWho asks."""', "has the word 'Who'"),
        ("profiles/a.py", 'raise E(f"{a} is told")', "has the word 'told'"),
        ("connectors/a.py", "a = 1  # somebody's", "has the word 'somebody'"),
        ("connectors/a.py", "self.told_blocks = 1", "has the word 'told'"),
        ("tests/test_a.py", "def test_who_asks(): ...", "has the word 'who'"),
        ("docs/a.md", "One\nwhose key", "has the word 'whose'"),
        ("README.md", "For anybody.", "has the word 'anybody'"),
    ],
)
def test_broken_rule_is_found(tmp_path: Path, file: str, source: str, problem: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(source)
    found = findings(tmp_path)
    assert {(each.file, each.problem) for each in found} == {(file, problem)}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("tiers/a.py", 'class One: ...\nlog.info("kvcache: a: %s", b)\nlog.info("kvcache: b: c")'),
        ("tiers/a.py", "whole = 1  # the whole holder is mentioned"),
        ("tests/test_a.py", 'def test_text_is_refused():\n  check("who")'),
        ("docs/decisions/0001-a.md", "Nobody."),
    ],
)
def test_kept_rule_is_not_reported(tmp_path: Path, file: str, source: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    assert findings(tmp_path) == []
