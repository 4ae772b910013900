"""What kvcache says to people when something is wrong, read from its source.

A message is a template: what is filled in at run time is "…". Found are the texts of exceptions
that are raised, of warnings and errors in the log, of what commands print to the standard error,
and of the problems that a profile's reader collects.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path

ROOMS = ("kvcache", "tiers", "profiles", "connectors")
LOGGED = {"warning", "error", "exception"}
COLLECTED = {"_add_problem": 1, "Refused": 1, "TierError": 1}
"""Calls that take a message, and in which place."""
CAUGHT = {"RejectedError"}
"""Exceptions that no caller sees: the tier that raises one catches it."""
ANSWERED = ("refusal", "shortage")
"""How names of functions end whose answer is a message, or none."""
FILLED = "…"

Names = Mapping[str, list[ast.expr]]
"""What names were given, where that is text."""


def messages(root: Path) -> dict[str, str]:
    """Every message under ``root``, with the first file and line that says it."""
    found: dict[str, str] = {}
    for path in files(root):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, text in told(tree, words(tree)):
            found.setdefault(text, f"{path.relative_to(root)}:{line}")
    return found


def files(root: Path) -> Iterable[Path]:
    """The sources that are published, each once; what is for tests of others is left out."""
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            if "testing" not in path.parts:
                yield path


def told(node: ast.AST, names: Names) -> Iterator[tuple[int, str]]:
    """The messages in a piece of source, with their lines."""
    if isinstance(node, ast.FunctionDef):
        names = {**names, **given(ast.walk(node))}
        if node.name.endswith(ANSWERED):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value:
                    yield from ((inner.lineno, text) for text in templates(inner.value, names))
    for line, expression in said(node):
        yield from ((line, text) for text in templates(expression, names))
    for child in ast.iter_child_nodes(node):
        yield from told(child, names)


def said(node: ast.AST) -> Iterator[tuple[int, ast.expr]]:
    """What this node alone says to people."""
    match node:
        case ast.Raise(exc=ast.Call(func=kind, args=[text, *_])) if (
            name(kind)[:1] != "_" and name(kind) not in CAUGHT
        ):
            yield node.lineno, text
        case ast.Call(func=ast.Attribute(attr=level), args=[text, *_]) if level in LOGGED:
            yield node.lineno, text
        case ast.Call(func=ast.Name("print"), args=[text], keywords=[ast.keyword("file"), *_]):
            yield node.lineno, text
        case ast.Call(func=func, args=args) if len(args) > COLLECTED.get(name(func), 9):
            yield node.lineno, args[COLLECTED[name(func)]]
        case ast.Call(func=ast.Attribute(attr="append", value=where), args=[text]):
            if name(where) == "problems":
                yield node.lineno, text
        case ast.keyword("problems", ast.List(texts)):
            yield from ((node.value.lineno, text) for text in texts)


def name(node: ast.expr) -> str:
    """The last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def words(tree: ast.Module) -> Names:
    """A module's constants that are one word, such as the names of variables."""
    return {
        name: texts
        for name, texts in given(tree.body).items()
        if not any(" " in text for value in texts for text in forms(value, {}))
    }


def given(nodes: Iterable[ast.AST]) -> Names:
    """All that is given, in these statements, to names that are given text at least once."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        match node:
            case (
                ast.Assign(targets=[ast.Name(target)], value=ast.expr() as value)
                | ast.AnnAssign(target=ast.Name(target), value=ast.expr() as value)
                | ast.NamedExpr(target=ast.Name(target), value=ast.expr() as value)
            ):
                found.setdefault(target, []).append(value)
    return {target: values for target, values in found.items() if any(map(is_text, values))}


def is_text(node: ast.expr) -> bool:
    """Whether an expression is of strings alone, and has words of its own."""
    match node:
        case ast.Constant(value):
            return isinstance(value, str)
        case ast.JoinedStr():
            return True
        case ast.IfExp(body=one, orelse=other):
            return is_text(one) and is_text(other)
        case _:
            return False


def templates(node: ast.expr, names: Names) -> Iterator[str]:
    """What an expression may say; nothing where there is no word of its own in it."""
    for text in forms(node, names):
        filled = re.sub(r"%[-+.\d]*[a-z]", FILLED, " ".join(text.split()))
        if re.search(r"[A-Za-z]{2}", filled):
            yield re.sub(rf"{FILLED}{FILLED}+", FILLED, filled)


def forms(node: ast.expr, names: Names) -> list[str]:
    """The texts of an expression of strings, one for each way its conditions may go."""
    match node:
        case ast.Constant(str(text)):
            return [text]
        case ast.JoinedStr(parts):
            return ["".join(each) for each in product(*(forms(part, names) for part in parts))]
        case ast.FormattedValue(value):
            return forms(value, names)
        case ast.BinOp(left, ast.Add(), right):
            both = product(forms(left, names), forms(right, names))
            return ["".join(each) for each in both]
        case ast.IfExp(body=one, orelse=other):
            return forms(one, names) + forms(other, names)
        case ast.Name(known) if known in names:
            # Where it is empty something else is said, and this is not the place to find what.
            return [text or FILLED for value in names[known] for text in forms(value, {})]
        case _:
            return [FILLED]
