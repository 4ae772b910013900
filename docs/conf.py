"""The site: Sphinx builds it from these pages, which are plain Markdown and read as well without.

`make docs` builds it strictly, into build/docs. Always true:

* A page of Markdown names no page twice: what is in the sidebar, and in which order, are the links
  that `index.md` lists. A page that is not listed there is an error.
* Building asks nothing of the network, and neither does a page that is looked at.
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

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

OTHERS = "array|collections|concurrent|io|opentelemetry|pathlib|typing"

# A reference to a name of ours that is on no page is an error. Others' names need not resolve: to
# ask their pages would take the network.
nitpicky = True
nitpick_ignore_regex = [("py:(?:class|obj)", rf"(?:{OTHERS})(?:\..*)?")]

LISTED = re.compile(r"(?m)^\* \[.*?\]\((?P<page>[\w/-]+)\.md\)|^\*\*(?P<caption>[\w ,]+)\*\*$")


def sidebar(index: str) -> str:
    """The toctrees of what `index.md` lists: one for each bold line, of the links below it."""
    lines: list[str] = []
    for found in LISTED.finditer(index):
        if found["caption"]:
            lines += ["```", "", "```{toctree}", ":hidden:", f":caption: {found['caption']}", ""]
        else:
            lines.append(found["page"])
    return "\n".join([*lines[2:], "```", ""])


def listed(_: Sphinx, page: str, source: list[str]) -> None:
    """Give the site what Markdown has no word for: which pages there are."""
    if page == "index":
        source[0] += sidebar(source[0])
    if page == "decisions/README":
        source[0] += "\n```{toctree}\n:glob:\n\n0*\n```\n"


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", listed)
