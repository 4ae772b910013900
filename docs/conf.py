"""Builds the site from the Markdown pages in this folder with Sphinx.

`make docs` builds it strictly, into build/docs. Invariants:

* The sidebar has the pages in the lists of `index.md`, in that order. Any other page is an error.
* The build uses no network, and neither do the pages in a browser.
"""

import re

from sphinx.application import Sphinx

import kvcache

project = "kvcache"
release = kvcache.__version__
html_title = f"kvcache {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["deploy"]
myst_heading_anchors = 3  # links to headings, as on GitHub

html_theme = "furo"
html_copy_source = False
html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]

autodoc_member_order = "bysource"
autodoc_mock_imports = ["mooncake"]  # has libraries of the system; its tier imports nothing of it
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # shows defaults as written, not values such as os.environ

OTHER_LIBRARIES = "array|collections|concurrent|io|opentelemetry|pathlib|typing"

# A reference to a name of kvcache that is on no page is an error. Names of other libraries are not
# resolved, since that needs the network.
nitpicky = True
nitpick_ignore = [
    ("py:class", "kvcache.connectors.jobs.R"),  # a type variable
    ("py:class", "kvcache.lower.direct_tier.DirectTier"),  # private; `open_tiers` makes them
]
nitpick_ignore_regex = [("py:(?:class|obj)", rf"(?:{OTHER_LIBRARIES})(?:\..*)?")]

FILE_AS_TITLE = re.compile(r"\[[\w/-]+\.md\]\(")
LIST_ITEM = re.compile(
    r"(?m)^\* \[(?P<title>.*?)\]\((?P<page>[\w/-]+)\.md\)|^\*\*(?P<caption>[\w ,]+)\*\*$"
)


def sidebar(index: str) -> str:
    """Return the toctrees of `index.md`: for each bold line, one with the links below it."""
    lines: list[str] = []
    for found in LIST_ITEM.finditer(index):
        if found["caption"]:
            lines += ["```", "", "```{toctree}", ":hidden:", f":caption: {found['caption']}", ""]
        else:
            lines.append(f"{found['title']} <{found['page']}>")
    return "\n".join([*lines[2:], "```", ""])


def prepare_page(_: Sphinx, page: str, source: list[str]) -> None:
    """Add what Markdown cannot express: the titles of linked pages, and the toctrees."""
    source[0] = FILE_AS_TITLE.sub("[](", source[0])
    if page == "index":
        source[0] += "\n" + sidebar(source[0])
    if page == "decisions/README":
        source[0] += "\n```{toctree}\n:glob:\n\n0*\n```\n"


def setup(app: Sphinx) -> None:
    """Register the hook; Sphinx calls this."""
    app.connect("source-read", prepare_page)
