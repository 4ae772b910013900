"""The site builds strictly, from any checkout and with no network, and asks for none when read."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import kvcache
import kvcache.eviction
import kvcache.profiles
import kvcache.testing

ROOT = Path(__file__).resolve().parent.parent
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc="([^"]+)"|"""
    r"""<link\b(?=[^>]*\brel="(?:stylesheet|icon|preload|preconnect)")[^>]*\bhref="([^"]+)"|"""
    r"""(?:url\(|@import\s+)["']?([^"')\s]+)"""
)


def command() -> list[str]:
    """How `make docs` calls Sphinx, less the two folders at its end."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [line] = re.findall(r"(?m)^\t\$\(BIN\)/python (-m sphinx .*)$", makefile)
    *options, source, target = shlex.split(line)
    assert (source, target) == ("docs", "build/docs")
    return [sys.executable, *options]


SECRET = "a-secret-of-whoever-builds"


def built(pages: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build ``pages``, as `make docs` does, into ``site``; proxies lead nowhere."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    return subprocess.run(
        [*command(), str(pages), str(site)],
        cwd=ROOT, env=os.environ | nowhere | {"SECRET": SECRET},
        text=True, check=False, capture_output=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    site = tmp_path_factory.mktemp("site")
    done = built(ROOT / "docs", site)
    assert done.returncode == 0, done.stderr
    return site


def test_every_page_is_there_and_in_the_sidebar(site: Path) -> None:
    sidebar = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").exists()
        if page.stem != "index":
            assert f'<a class="reference internal" href="{page.stem}.html"' in sidebar
    decisions = (site / "decisions" / "README.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs" / "decisions").glob("0*.md"):
        assert f'href="{page.stem}.html"' in decisions


def test_what_is_public_is_in_the_reference(site: Path) -> None:
    page = (site / "reference.html").read_text(encoding="utf-8")
    described = set(re.findall(r'<dt class="sig[^>]* id="([\w.]+)"', page))
    for module in (kvcache, kvcache.profiles, kvcache.testing):
        for name in module.__all__:
            assert hasattr(module, name)
            assert f"{module.__name__}.{name}" in described
    assert {"kvcache.eviction.Policy", "kvcache.Tier.load", "kvcache.Lease.end"} <= described


def test_nothing_of_who_built_it_is_in_it(site: Path) -> None:
    files = [file for file in site.rglob("*") if file.is_file() and ".doctrees" not in file.parts]
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    assert [file for file in files if str(ROOT).encode() in file.read_bytes()] == []


def test_a_page_that_is_looked_at_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = [
        (file.name, found)
        for file in site.rglob("*")
        if file.suffix in {".html", ".css"}
        for found in loads(file.read_text(encoding="utf-8"))
    ]
    assert loaded
    assert [(name, place) for name, place in loaded if re.match(r"(?:https?:)?//", place)] == []


def loads(text: str) -> list[str]:
    return [next(filter(None, found)) for found in LOADED.findall(text)]


@pytest.mark.parametrize(
    "text",
    [
        '<script async src="https://x.example/a.js"></script>',
        '<img alt="" src="https://x.example/a.png">',
        '<link href="https://x.example/a.css" rel="stylesheet">',
        "@import 'https://x.example/a.css'",
        "body { background: url(https://x.example/a.png) }",
    ],
)
def test_what_is_loaded_from_elsewhere_is_found(text: str) -> None:
    [place] = loads(text)
    assert place.startswith("https://x.example/a.")


def test_links_from_the_front_page_lead_somewhere() -> None:
    """Sphinx sees to those between pages; these two are outside of its folder."""
    for page in ("README.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8"))
        for place, _, heading in (link.partition("#") for link in links if "://" not in link):
            assert (ROOT / place).exists(), place
            if heading:
                assert heading in headings(ROOT / place), f"{place}#{heading}"


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_picture_of_the_demo_is_of_the_run_that_the_page_has() -> None:
    picture = (ROOT / "docs" / "images" / "demo.svg").read_text(encoding="utf-8")
    drawn = ["".join(text.itertext()) for text in ET.fromstring(picture)[2:]]
    page = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    [printed] = re.findall(r"(?s)```text\n(.*?)```", page)
    assert drawn == ["$ make run", *filter(None, printed.splitlines())]


def test_terminal_output_is_drawn_in_its_colours() -> None:
    printed = "1 of 2 .\r2 of 2 ..\r\n\r\n\x1b[1;32mfine\x1b[0m <&>\r\n"
    log = f"Script started on a day\n{printed}Script done\n"
    drawn = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "images" / "terminal.py"), "make it"],
        input=log, text=True, check=True, capture_output=True,
    ).stdout  # fmt: skip
    texts = ET.fromstring(drawn)[2:]
    assert ["".join(text.itertext()) for text in texts] == ["$ make it", "2 of 2 ..", "fine <&>"]
    [green] = [span for span in texts[2] if span.text == "fine"]
    assert "fill" in green.attrib["style"]


def test_what_is_wrong_with_a_page_is_found(tmp_path: Path) -> None:
    pages = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", pages)
    with (pages / "vllm.md").open("a", encoding="utf-8") as page:
        page.write("\n[gone](no-such-page.md), [gone too](metrics.md#no-such-heading)\n")
        page.write("\n![gone as well](images/no-such-picture.png)\n")
    with (pages / "reference.md").open("a", encoding="utf-8") as page:
        page.write("\n```{eval-rst}\n.. autofunction:: kvcache.no_such_name\n\n")
        page.write(":func:`kvcache.no_such_reference`\n```\n")
    (pages / "lost.md").write_text("# Of a page that nothing lists\n", encoding="utf-8")
    done = built(pages, tmp_path / "site")
    assert done.returncode == 1
    for what in ("no-such-page", "no-such-heading", "no-such-picture", "no_such_name",
                 "no_such_reference", "lost.md"):  # fmt: skip
        assert what in done.stderr, what
