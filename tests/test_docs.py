"""What the documents show is true: every fenced block in them is run, loaded or parsed.

A block is checked by its language: python is executed (the blocks of one page share their names),
toml with tiers in it is loaded as a profile, json is parsed, and in bash the commands that are
ours or name something of ours are held against it. Output is ```text. A language that is in
neither table is an error, so that no block goes unchecked by accident.
"""

import argparse
import ast
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer
from sybil.typing import Evaluator

from kvcache import cli
from kvcache.profiles import load_profile

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
SHOWN_ONLY = {"diff", "mermaid", "text", "yaml"}


def check_toml(example: Example) -> None:
    """Load a profile; anything else need only be TOML."""
    if "tier" not in tomllib.loads(example.parsed):
        return
    with TemporaryDirectory() as folder:
        profile = Path(folder, "page.toml")
        profile.write_text(example.parsed, encoding="utf-8")
        load_profile(str(profile), environ={})


def check_json(example: Example) -> None:
    json.loads(example.parsed)


def check_bash(example: Example) -> None:
    """Hold each command against what it names, as far as that is ours."""
    for words in commands(example.parsed):
        match words:
            case ["kvcache", *arguments] | ["python", "-m", "kvcache", *arguments]:
                parse_arguments(cli.parser(), arguments)
            case ["make", *targets]:
                for target in targets:
                    if "=" not in target:
                        assert_target(target)
            case ["pip", "install", *arguments]:
                for argument in arguments:
                    assert_extras(argument)
            case ["vllm", "serve", *arguments]:
                for config in values_of("--kv-transfer-config", arguments):
                    assert_connector(config)


CHECKS: dict[str, Evaluator] = {
    "python": PythonEvaluator(),
    "toml": check_toml,
    "json": check_json,
    "bash": check_bash,
}


def commands(script: str) -> Iterator[list[str]]:
    """Split a script into its commands' words, less variables before them and redirections."""
    script = re.sub(r"\\\n", " ", script)
    script = re.sub(r"(?m)(^|\s)#.*$", "", script)
    lexer = shlex.shlex(script, posix=True, punctuation_chars=";&|<>\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    for token in [*lexer, ";"]:
        if token.strip(";&|\n"):
            words.append(token)
            continue
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        if words:
            yield words[
                : next((i for i, word in enumerate(words) if word in {"<", ">", ">>"}), None)
            ]
        words = []


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    said = StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            parser.parse_args(arguments)
    except SystemExit as stop:
        if stop.code:
            raise AssertionError(said.getvalue()) from None


def assert_target(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"(?m)^{re.escape(target)}:", makefile), f"make has no target {target}"


def assert_extras(argument: str) -> None:
    """Check the extras of `kvcache[...]`, also where it is written `.[...]`."""
    asked = re.match(r"(?:kvcache|\.)\[(.*?)\]", argument)
    if asked:
        unknown = set(asked[1].split(",")) - EXTRAS
        assert not unknown, f"kvcache has no extra {sorted(unknown)}"


def values_of(option: str, arguments: list[str]) -> Iterator[str]:
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == option:
            yield after
        elif argument.startswith(f"{option}="):
            yield argument.partition("=")[2]


def assert_connector(config: str) -> None:
    """Check that the JSON names a class that is there; reading the source needs no engine."""
    wanted = json.loads(config)
    module, name = wanted["kv_connector_module_path"], wanted["kv_connector"]
    source = ROOT.joinpath(*module.split("."), "__init__.py").read_text(encoding="utf-8")
    classes = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    assert name in classes, f"{module} has no class {name}, only {sorted(classes)}"


def fenced_blocks(document: Document) -> Iterable[Region]:
    for region in FencedCodeBlockLexer(r"[^\n]*")(document):
        language = region.lexemes["language"]
        if language in SHOWN_ONLY:
            continue
        line = document.line_column(region.start)
        assert language in CHECKS, f"{document.path}, {line}: no check for a block of {language!r}"
        region.parsed, region.evaluator = region.lexemes["source"], CHECKS[language]
        yield region


def run_page(page: Path) -> None:
    """Check every block of a page, in order; the error names the page and the line.

    What a block sets in the environment ends with the page.
    """
    with patch.dict(os.environ):
        for example in Document.parse(str(page), fenced_blocks, SkipParser()).examples():
            try:
                example.evaluate()
            except Exception as error:
                error.add_note(f"in the block at {page}:{example.line}")
                raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_holds(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)


SERVE = "vllm serve m --kv-transfer-config"
MODULE = '"kv_connector_module_path":"kvcache.connectors.vllm"'


@pytest.mark.parametrize(
    ("language", "block"),
    [
        ("python", "assert 1 == 1"),
        ("toml", '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"'),
        ("toml", "[tool.ruff]\nline-length = 100"),
        ("bash", "cd kvcache && make test  # everything\nkvcache demo --json > demo.json"),
        ("bash", "pip install 'kvcache[vllm,otel]'\nKVCACHE_PROFILE=l1-only kvcache bench"),
        ("bash", f'{SERVE} \\\n \'{{"kv_connector":"KVCacheConnector",\n{MODULE}}}\' --seed 0'),
        ("json", '{"hits": 1}'),
        ("text", "anything"),
    ],
)
def test_a_true_block_passes(tmp_path: Path, language: str, block: str) -> None:
    (tmp_path / "page.md").write_text(f"# A page\n\n```{language}\n{block}\n```\n")
    run_page(tmp_path / "page.md")


@pytest.mark.parametrize(
    ("language", "block"),
    [
        ("python", "assert 1 == 2"),
        ("toml", '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"\nno_such_option = 1'),
        ("toml", "[tier"),
        ("json", "{,}"),
        ("bash", "true  # first\nkvcache no-such-command"),
        ("bash", "true && python -m kvcache bench --no-such-option"),
        ("bash", "make no-such-target"),
        ("bash", "pip install -e '.[no-such-extra]'"),
        ("bash", f"{SERVE} '{{\"kv_connector\":'"),
        ("bash", f'{SERVE}=\'{{"kv_connector":"NoSuchConnector",{MODULE}}}\''),
        ("no-such-language", ""),
        ("", "no language"),
    ],
)
def test_a_false_block_is_found(tmp_path: Path, language: str, block: str) -> None:
    (tmp_path / "page.md").write_text(f"# A page\n\n```{language}\n{block}\n```\n")
    with pytest.raises((AssertionError, ValueError)):
        run_page(tmp_path / "page.md")
