"""Collect the messages for people from the source of kvcache.

A message is the text of a raised exception, a warning or error in the log, an output of a command
on the standard error, or a problem in a profile. "…" stands for each part that varies.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path

FOLDERS = ("kvcache", "tiers", "profiles", "connectors")
LOGGED = {"warning", "error", "exception"}
COLLECTED = {"_add_problem": 1, "ErrorReply": 1, "TierError": 1}
"""Functions that take a message, and the position of that argument."""
CAUGHT = {"RejectedError"}
"""Exceptions that are not messages: the tier that raises one also catches it."""
RETURNED = ("refusal", "shortage")
"""Endings of names of functions that return a message or None."""
VARIES = "…"

Names = Mapping[str, list[ast.expr]]
"""The expressions that are assigned to a name, for names of texts."""


def messages(root: Path) -> dict[str, str]:
    """Return every message under ``root``, with the first file and line that has it."""
    found: dict[str, str] = {}
    for path in files(root):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, text in messages_in(tree, one_word_constants(tree)):
            found.setdefault(text, f"{path.relative_to(root)}:{line}")
    return found


def files(root: Path) -> Iterable[Path]:
    """Yield the published source files; `kvcache.testing` is for the tests of other packages."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            if "testing" not in path.parts:
                yield path


def messages_in(node: ast.AST, names: Names) -> Iterator[tuple[int, str]]:
    """Yield the messages in a syntax tree, with their lines."""
    if isinstance(node, ast.FunctionDef):
        names = {**names, **assigned_texts(ast.walk(node))}
        if node.name.endswith(RETURNED):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value:
                    yield from ((inner.lineno, text) for text in templates(inner.value, names))
    for line, expression in message_expressions(node):
        yield from ((line, text) for text in templates(expression, names))
    for child in ast.iter_child_nodes(node):
        yield from messages_in(child, names)


def message_expressions(node: ast.AST) -> Iterator[tuple[int, ast.expr]]:
    """Yield the messages of this node, without its children."""
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
        case ast.Call(func=ast.Attribute(attr="append", value=target), args=[text]):
            if name(target) == "problems":
                yield node.lineno, text
        case ast.keyword("problems", ast.List(texts)):
            yield from ((node.value.lineno, text) for text in texts)


def name(node: ast.expr) -> str:
    """Return the last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def one_word_constants(tree: ast.Module) -> Names:
    """Return a module's constants of one word, such as the names of variables."""
    return {
        name: texts
        for name, texts in assigned_texts(tree.body).items()
        if not any(" " in text for value in texts for text in forms(value, {}))
    }


def assigned_texts(nodes: Iterable[ast.AST]) -> Names:
    """Return all assignments in ``nodes`` to names to which a text is assigned."""
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
    """Return whether an expression consists of strings."""
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
    """Yield the messages that an expression may be; none without a word of its own."""
    for text in forms(node, names):
        message = re.sub(r"%[-+.\d]*[a-z]", VARIES, " ".join(text.split()))
        if re.search(r"[A-Za-z]{2}", message):
            yield re.sub(rf"{VARIES}{VARIES}+", VARIES, message)


def forms(node: ast.expr, names: Names) -> list[str]:
    """Return the texts of an expression, one for each combination of its conditions."""
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
            # For an empty text, the code elsewhere uses another text.
            return [text or VARIES for value in names[known] for text in forms(value, {})]
        case _:
            return [VARIES]
