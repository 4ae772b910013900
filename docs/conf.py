"""The site: Sphinx builds it from these pages, which are plain Markdown and read as well without.

`make docs` builds it strictly, into build/docs. Always true:

* The sidebar has the pages that `index.md` links to in its lists, in that order. A page that is not
  there is an error.
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
html_static_path = ["site.css"]
html_css_files = ["site.css"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # as written: a default such as os.environ is nobody's business

OTHERS = "array|collections|concurrent|io|opentelemetry|pathlib|typing"

# A reference to a name of ours that is on no page is an error. Others' names need not resolve: to
# ask their pages would take the network.
nitpicky = True
nitpick_ignore = [("py:class", "kvcache.connectors.jobs.R")]  # a type variable
nitpick_ignore_regex = [("py:(?:class|obj)", rf"(?:{OTHERS})(?:\..*)?")]

FILE_AS_TITLE = re.compile(r"\[[\w/-]+\.md\]\(")
LISTED = re.compile(
    r"(?m)^\* \[(?P<title>.*?)\]\((?P<page>[\w/-]+)\.md\)|^\*\*(?P<caption>[\w ,]+)\*\*$"
)


def sidebar(index: str) -> str:
    """The toctrees of what `index.md` lists: one for each bold line, of the links below it."""
    lines: list[str] = []
    for found in LISTED.finditer(index):
        if found["caption"]:
            lines += ["```", "", "```{toctree}", ":hidden:", f":caption: {found['caption']}", ""]
        else:
            lines.append(f"{found['title']} <{found['page']}>")
    return "\n".join([*lines[2:], "```", ""])


def listed(_: Sphinx, page: str, source: list[str]) -> None:
    """Give the site what Markdown has no word for: the titles of pages, and which there are."""
    source[0] = FILE_AS_TITLE.sub("[](", source[0])
    if page == "index":
        source[0] += "\n" + sidebar(source[0])
    if page == "decisions/README":
        source[0] += "\n```{toctree}\n:glob:\n\n0*\n```\n"


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", listed)
