"""Every fenced block in the documents is executed, loaded or parsed.

The check depends on the language. Python blocks are executed, and the blocks of a page share their
names. TOML with tiers is loaded as a profile. JSON is parsed. In bash, commands of this project are
checked, and arguments that name parts of it. Output is marked ```text. A language that is in none
of the tables is an error, so that no block is left out by accident.

Each page runs in a folder of its own. A block that begins with a comment with a file name becomes
that file, for later blocks to import and open; `pytest FILE`, `python FILE` and `pip install .` are
executed. The output of `kvcache plan`, and of `replay` with generated traffic, must be on the page,
except for measured times.
"""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer
from sybil.typing import Evaluator

from kvcache import cli, telemetry
from kvcache.connectors import sglang
from kvcache.connectors.sglang.options import read_options
from kvcache.profiles import load_profile
from kvcache.profiles.load import load_tables
from kvcache.testing import TierTests
from kvcache.tiers.framed import Framed
from tests.support.contract_runs import failing_tests
from tests.support.packages import marks_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ON_AN_ENGINE = {"quick-start.md"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
SHOWN_ONLY = {"diff", "text", "yaml", "{eval-rst}"}  # the last is read by the site's build


def check_toml(example: Example) -> None:
    """Load a profile; other documents only have to be TOML."""
    if not {"tier", "extends"} & tomllib.loads(example.parsed).keys():
        return
    with TemporaryDirectory() as folder:
        profile = Path(folder, "page.toml")
        profile.write_text(example.parsed, encoding="utf-8")
        load_profile(str(profile), environ={})


def check_json(example: Example) -> None:
    json.loads(example.parsed)


def check_bash(example: Example) -> None:
    """Check each command of this project, and the arguments that name parts of it."""
    for words in commands(example.parsed):
        match words:
            case ["kvcache", *arguments] | ["python", "-m", "kvcache", *arguments]:
                parse_arguments(cli.parser(), arguments)
                if has_fixed_output(arguments):
                    assert_printed(arguments, example.document.text)
            case ["make", *targets]:
                for target in targets:
                    if "=" not in target:
                        assert_target(target)
            case ["pip", "install", *arguments] if arguments != ["."]:
                for argument in arguments:
                    assert_extras(argument)
            case ["vllm", "serve", *arguments]:
                for config in values_of("--kv-transfer-config", arguments):
                    assert_connector(config)
            case ["sglang", "serve", *arguments]:
                assert_storage_backend(arguments)
            case _:
                run_on_page_files(words)


CHECKS: dict[str, Evaluator] = {
    "python": PythonEvaluator(),
    "toml": check_toml,
    "json": check_json,
    "bash": check_bash,
}


def commands(script: str) -> Iterator[list[str]]:
    """Yield the words of each command of a script, without variables and redirections."""
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


def run_on_page_files(words: list[str]) -> None:
    """Run a command that uses the files of the page."""
    match words:
        case ["pytest", file]:
            run_python("-m", "pytest", "-q", file)
        case ["python" | ".venv/bin/python", file]:
            run_python(file)
        case ["pip", "install", "."]:
            install_page_package()


def run_python(*arguments: str) -> None:
    """Run a Python interpreter with the same import path; it must succeed.

    Engines that it starts use no network.
    """
    path = os.pathsep.join(path for path in sys.path if path)
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        env=os.environ | offline | {"PYTHONPATH": path},
        text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def install_page_package() -> None:
    """Install the page's package into a folder that replaces the page's on the import path."""
    here, there = Path.cwd(), Path("installed").absolute()
    offline = ("--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check")
    run_python("-m", "pip", "install", *offline, "--target", str(there), ".")
    sys.path[sys.path.index(str(here))] = str(there)


def forget_modules(folder: Path) -> None:
    """Remove the modules of ``folder`` from sys.modules, so that they are imported again."""
    importlib.invalidate_caches()
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(f"{folder}{os.sep}"):
            del sys.modules[name]


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    output = StringIO()
    try:
        with redirect_stderr(output), redirect_stdout(output):
            parser.parse_args(arguments)
    except SystemExit as stop:
        if stop.code:
            raise AssertionError(output.getvalue()) from None


def has_fixed_output(arguments: Sequence[str]) -> bool:
    """Whether the output of a command depends on no machine, and it writes no file."""
    options = set(arguments)
    return ({"plan", "--pod-memory", "--bandwidth"} <= options) or (
        {"replay", "--generate"} <= options and "--plot" not in options
    )


def assert_printed(arguments: Sequence[str], page: str) -> None:
    """Check that the output is on the page, except for the times in a replay's last column."""
    printed = StringIO()
    with redirect_stdout(printed):
        assert cli.main(arguments) == 0
    for line in printed.getvalue().splitlines():
        measured = re.fullmatch(r"(.* )\d+\.\d\d", line) if arguments[0] == "replay" else None
        assert (measured[1] if measured else line) in page, f"not on the page: {line}"


def assert_target(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"(?m)^{re.escape(target)}:", makefile), f"make has no target {target}"


def assert_extras(argument: str) -> None:
    """Check the extras of `kvcache[...]` and `.[...]`.

    kvcache is on no package index: a page that installs an engine must install from the checkout.
    """
    extra = re.match(r"(kvcache|\.)\[(.*?)\]", argument)
    assert extra or not argument.startswith("kvcache"), f"no index has {argument}"
    if extra:
        extras = set(extra[2].split(","))
        assert not extras - EXTRAS, f"kvcache has no extra {sorted(extras - EXTRAS)}"
        first = extras & {"vllm", "engine", "torch"}
        assert extra[1] == "." or not first, f"no index has {argument}; write .[...]"


def values_of(option: str, arguments: list[str]) -> Iterator[str]:
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == option:
            yield after
        elif argument.startswith(f"{option}="):
            yield argument.partition("=")[2]


def assert_storage_backend(arguments: list[str]) -> None:
    """Check the options of the SGLang backend."""
    for config in values_of("--hicache-storage-backend-extra-config", arguments):
        options = json.loads(config)
        read_options(options)
        assert options["module_path"] == sglang.__name__
        assert options["class_name"] in sglang.__all__


def assert_connector(config: str) -> None:
    """Check that the classes in the JSON exist, by the source, which needs no engine."""
    wanted = json.loads(config)
    if wanted["kv_connector"] != "OffloadingConnector":  # vLLM's own
        assert_class(wanted["kv_connector_module_path"], wanted["kv_connector"])
        return
    for tier in wanted["kv_connector_extra_config"]["secondary_tiers"]:
        assert_class(tier["module_path"], tier["type"])
        if "tiers" in tier:
            load_tables(tier["tiers"], origin="tiers", environ={})


def assert_class(module: str, name: str) -> None:
    """Check that a module, or a package, defines or imports a class."""
    source = ROOT.joinpath(*module.split("."), "__init__.py").read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(source)))  # a lazy import is in an `if` and in a function
    names = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    assert name in names, f"{module} has no class {name}, only {sorted(names)}"


def fenced_blocks(document: Document) -> Iterable[Region]:
    for region in FencedCodeBlockLexer(r"[^\n]*")(document):
        language = region.lexemes["language"]
        if language in SHOWN_ONLY:
            continue
        line = document.line_column(region.start)
        assert language in CHECKS, f"{document.path}, {line}: no check for a block of {language!r}"
        region.parsed, region.evaluator = region.lexemes["source"], CHECKS[language]
        yield region


def write_if_named(block: str) -> str:
    """Write a block to the file that its first comment names, if any; return the name."""
    name = re.match(r"# ([\w-]+\.\w+)\n", block)
    if not name:
        return ""
    Path(name[1]).write_text(block, encoding="utf-8")
    return name[1]


def run_page(page: Path, folder: Path) -> None:
    """Check every block of a page, in order; an error names the page and the line.

    Environment variables that a block sets, and its imports from ``folder``, end with the page.
    """
    path = [str(folder), *sys.path]
    with chdir(folder), patch.dict(os.environ), patch.object(sys, "path", path):
        for example in Document.parse(str(page), fenced_blocks, SkipParser()).examples():
            name = write_if_named(example.parsed)
            if name and f"python {name}\n" in example.document.text:
                continue  # a program, which another block runs
            try:
                example.evaluate()
            except Exception as error:
                error.add_note(f"in the block at {page}:{example.line}")
                raise
            finally:
                forget_modules(folder)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=str(page.relative_to(ROOT)),
            marks=[pytest.mark.engine] if page.name in ON_AN_ENGINE else marks_of(page.name),
        )
        for page in PAGES
    ],
)
def test_blocks_of_each_page_pass(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path)


def test_tier_of_the_page_keeps_the_contract_inside_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stack uses the tier inside frames and from several threads."""
    run_page(ROOT / "docs/add-a-tier.md", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    printed = importlib.import_module("sqlite_tier").SqliteTier
    names = (str(tmp_path / f"{at}.db") for at in count())
    nbytes = TierTests.block_nbytes
    assert not failing_tests(
        TierTests, lambda: Framed(printed(path=next(names)), block_nbytes=nbytes)
    )
    forget_modules(tmp_path)


SERVE = "vllm serve m --kv-transfer-config"
MODULE = '"kv_connector_module_path":"kvcache.connectors.vllm"'


@pytest.mark.parametrize(
    ("language", "block"),
    [
        ("python", "assert 1 == 1"),
        ("toml", '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"'),
        ("toml", "[tool.ruff]\nline-length = 100"),
        ("bash", "cd kvcache && make test  # everything\nkvcache demo --json > demo.json"),
        ("bash", "pip install '.[vllm,otel]'\nKVCACHE_PROFILE=l1-only kvcache bench"),
        ("bash", "pip install 'kvcache[otel]'"),
        ("bash", f'{SERVE} \\\n \'{{"kv_connector":"KVCacheConnector",\n{MODULE}}}\' --seed 0'),
        ("json", '{"hits": 1}'),
        ("text", "anything"),
    ],
)
def test_correct_block_passes(tmp_path: Path, language: str, block: str) -> None:
    (tmp_path / "page.md").write_text(f"# A page\n\n```{language}\n{block}\n```\n")
    run_page(tmp_path / "page.md", tmp_path)


@pytest.mark.parametrize(
    ("language", "block"),
    [
        ("python", "assert 1 == 2"),
        ("toml", '[[tier]]\nname = "l1"\nkind = "dram"\ncapacity = "1MiB"\nno_such_option = 1'),
        ("toml", 'extends = "no-such-profile"'),
        ("toml", "[tier"),
        ("json", "{,}"),
        ("bash", "true  # first\nkvcache no-such-command"),
        ("bash", "true && python -m kvcache bench --no-such-option"),
        ("bash", "make no-such-target"),
        ("bash", "pip install -e '.[no-such-extra]'"),
        ("bash", "pip install 'kvcache[vllm]'"),
        ("bash", "pip install kvcache"),
        ("bash", "pip install ."),
        ("bash", "python no_such_program.py"),
        ("bash", "kvcache replay --generate rag --requests 10 --capacity 10 --policy lru"),
        ("bash", "pytest test_nothing.py"),
        ("bash", f"{SERVE} '{{\"kv_connector\":'"),
        ("bash", f'{SERVE}=\'{{"kv_connector":"NoSuchConnector",{MODULE}}}\''),
        ("no-such-language", ""),
        ("", "no language"),
    ],
)
def test_wrong_block_fails(tmp_path: Path, language: str, block: str) -> None:
    (tmp_path / "page.md").write_text(f"# A page\n\n```{language}\n{block}\n```\n")
    with pytest.raises((AssertionError, ValueError)):
        run_page(tmp_path / "page.md", tmp_path)


def test_spans_page_has_every_attribute_and_event() -> None:
    page = (ROOT / "docs/spans.md").read_text(encoding="utf-8")
    values = {v for k, v in vars(telemetry).items() if k.isupper() and isinstance(v, str)}
    rows = "".join(line for line in page.splitlines(True) if line.startswith("|"))
    assert set(re.findall(r"`((?:kvcache|gen_ai|error|exception)\.[a-z0-9_.]+)`", rows)) == {
        value for value in values if "." in value
    }
    reasons = {telemetry.SLOWER, telemetry.BREAKER_OPEN}
    assert all(f"`{reason}`" in rows for reason in reasons)
    assert {value for value in values if "." not in value} == reasons
