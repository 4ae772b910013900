"""Draws what a command printed on a terminal as an SVG: text that is text, in its colours.

The picture in the README is of a real run, in a checkout after `make run`:

    script -qec ".venv/bin/kvcache demo" demo.log
    python docs/images/terminal.py "make run" < demo.log > docs/images/demo.svg

Needs the standard library alone.
"""

import re
import sys
from collections.abc import Iterator
from html import escape

STYLES = {
    "1": "font-weight:700;fill:#ffffff",
    "1;31": "font-weight:700;fill:#ff7b72",
    "1;32": "font-weight:700;fill:#7ee787",
    "1;33": "font-weight:700;fill:#e3b341",
}
WIDE, HIGH, LEFT, TOP = 8.4, 19, 18, 34  # of a character, and the margins
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
PAINTED = re.compile(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m")


def lines_of(log: str) -> list[str]:
    """The lines of a log of `script`, less what it says itself."""
    lines = [line.rpartition("\r")[2] for line in log.replace("\r\n", "\n").split("\n")]
    said = [line for line in lines if not line.startswith(("Script started", "Script done"))]
    return "\n".join(said).strip("\n").split("\n")


def spans(line: str) -> Iterator[str]:
    """A line in pieces of one colour."""
    at = 0
    for piece in PAINTED.finditer(line):
        yield escape(line[at : piece.start()], quote=False)
        text = escape(piece[2], quote=False)
        yield f'<tspan style="{STYLES[piece[1]]}">{text}</tspan>'
        at = piece.end()
    yield escape(line[at:], quote=False)


def drawn(command: str, log: str) -> str:
    """The picture, as a file's text."""
    lines = [f"\x1b[1m$ {command}\x1b[0m", *lines_of(log)]
    lengths = [len(PAINTED.sub(r"\2", line)) for line in lines]
    width = round(max(lengths) * WIDE + 2 * LEFT)
    height = TOP + len(lines) * HIGH + LEFT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" font-family="{FONT}" font-size="14" fill="#c9d1d9">\n'
        f"<title>What {escape(command)} prints</title>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>\n'
    )
    texts = [
        # The length is given, so that columns stand whatever font there is.
        f'<text x="{LEFT}" y="{TOP + at * HIGH}" xml:space="preserve"'
        f' textLength="{length * WIDE:.1f}">{"".join(spans(line))}</text>\n'
        for at, (line, length) in enumerate(zip(lines, lengths, strict=True))
        if length
    ]
    return head + "".join(texts) + "</svg>\n"


if __name__ == "__main__":
    sys.stdout.write(drawn(sys.argv[1], sys.stdin.read()))
