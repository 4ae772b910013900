"""The site builds strictly, without a network, and its pages load nothing from other hosts."""

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
LOADED_URL = re.compile(
    r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc="([^"]+)"|"""
    r"""<link\b(?=[^>]*\brel="(?:stylesheet|icon|preload|preconnect)")[^>]*\bhref="([^"]+)"|"""
    r"""(?:url\(|@import\s+)["']?([^"')\s]+)"""
)


def sphinx_command() -> list[str]:
    """Return the command by which `make docs` runs Sphinx, without the two folders."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [line] = re.findall(r"(?m)^\t\$\(BIN\)/python (-m sphinx .*)$", makefile)
    *options, source, target = shlex.split(line)
    assert (source, target) == ("docs", "build/docs")
    return [sys.executable, *options]


SECRET = "a-secret-of-the-environment"


def build_site(pages: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build ``pages`` into ``site`` like `make docs`, with proxies that refuse connections."""
    no_proxy = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    return subprocess.run(
        [*sphinx_command(), str(pages), str(site)],
        cwd=ROOT, env=os.environ | no_proxy | {"SECRET": SECRET},
        text=True, check=False, capture_output=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, build_site strictly."""
    site = tmp_path_factory.mktemp("site")
    done = build_site(ROOT / "docs", site)
    assert done.returncode == 0, done.stderr
    return site


def test_site_has_every_page_in_its_sidebar(site: Path) -> None:
    sidebar = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").exists()
        if page.stem != "index":
            assert f'<a class="reference internal" href="{page.stem}.html"' in sidebar
    decisions = (site / "decisions" / "README.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs" / "decisions").glob("0*.md"):
        assert f'href="{page.stem}.html"' in decisions


def test_reference_has_every_public_name(site: Path) -> None:
    page = (site / "reference.html").read_text(encoding="utf-8")
    described = set(re.findall(r'<dt class="sig[^>]* id="([\w.]+)"', page))
    for module in (kvcache, kvcache.profiles, kvcache.testing):
        for name in module.__all__:
            assert hasattr(module, name)
            assert f"{module.__name__}.{name}" in described
    assert {"kvcache.eviction.Policy", "kvcache.Tier.load", "kvcache.Lease.end"} <= described


def test_site_has_no_data_of_the_machine_that_built_it(site: Path) -> None:
    files = [file for file in site.rglob("*") if file.is_file() and ".doctrees" not in file.parts]
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    assert [file for file in files if str(ROOT).encode() in file.read_bytes()] == []


def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    loaded = [
        (file.name, found)
        for file in site.rglob("*")
        if file.suffix in {".html", ".css"}
        for found in loaded_urls(file.read_text(encoding="utf-8"))
    ]
    assert loaded
    assert [(name, place) for name, place in loaded if re.match(r"(?:https?:)?//", place)] == []


def loaded_urls(text: str) -> list[str]:
    return [next(filter(None, found)) for found in LOADED_URL.findall(text)]


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
def test_url_of_another_host_is_found(text: str) -> None:
    [place] = loaded_urls(text)
    assert place.startswith("https://x.example/a.")


def test_links_of_readme_and_contributing_have_targets() -> None:
    """Sphinx checks the links between pages of docs/ only."""
    for page in ("README.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8"))
        for place, _, heading in (link.partition("#") for link in links if "://" not in link):
            assert (ROOT / place).exists(), place
            if heading:
                assert heading in headings(ROOT / place), f"{place}#{heading}"


def headings(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_picture_of_the_demo_matches_the_quick_start() -> None:
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


def test_build_reports_broken_links_and_references(tmp_path: Path) -> None:
    pages = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", pages)
    with (pages / "vllm.md").open("a", encoding="utf-8") as page:
        page.write("\n[gone](no-such-page.md), [gone too](metrics.md#no-such-heading)\n")
        page.write("\n![gone as well](images/no-such-picture.png)\n")
    with (pages / "reference.md").open("a", encoding="utf-8") as page:
        page.write("\n```{eval-rst}\n.. autofunction:: kvcache.no_such_name\n\n")
        page.write(":func:`kvcache.no_such_reference`\n```\n")
    (pages / "lost.md").write_text("# Of a page that nothing lists\n", encoding="utf-8")
    done = build_site(pages, tmp_path / "site")
    assert done.returncode == 1
    for what in ("no-such-page", "no-such-heading", "no-such-picture", "no_such_name",
                 "no_such_reference", "lost.md"):  # fmt: skip
        assert what in done.stderr, what
