"""Draws the terminal output of a command as an SVG with selectable text in its colours.

The picture in the README shows a real run. To draw it again, in a checkout after `make run`:

    script -qec ".venv/bin/kvcache demo" demo.log
    python docs/images/terminal.py "make run" < demo.log > docs/images/demo.svg

It needs only the standard library.
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
CHARACTER_WIDTH, LINE_HEIGHT, LEFT, TOP = 8.4, 19, 18, 34  # pixels; LEFT and TOP are margins
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
COLOURED = re.compile(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m")


def lines_of(log: str) -> list[str]:
    """Return the lines of a log of `script` without its own first and last line."""
    lines = [line.rpartition("\r")[2] for line in log.replace("\r\n", "\n").split("\n")]
    printed = [line for line in lines if not line.startswith(("Script started", "Script done"))]
    return "\n".join(printed).strip("\n").split("\n")


def spans(line: str) -> Iterator[str]:
    """Yield the parts of a line, each of one colour, as SVG."""
    at = 0
    for piece in COLOURED.finditer(line):
        yield escape(line[at : piece.start()], quote=False)
        text = escape(piece[2], quote=False)
        yield f'<tspan style="{STYLES[piece[1]]}">{text}</tspan>'
        at = piece.end()
    yield escape(line[at:], quote=False)


def draw(command: str, log: str) -> str:
    """Return the picture as the text of an SVG file."""
    lines = [f"\x1b[1m$ {command}\x1b[0m", *lines_of(log)]
    lengths = [len(COLOURED.sub(r"\2", line)) for line in lines]
    width = round(max(lengths) * CHARACTER_WIDTH + 2 * LEFT)
    height = TOP + len(lines) * LINE_HEIGHT + LEFT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" font-family="{FONT}" font-size="14" fill="#c9d1d9">\n'
        f"<title>What {escape(command)} prints</title>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>\n'
    )
    texts = [
        # The given length keeps columns aligned in any font.
        f'<text x="{LEFT}" y="{TOP + at * LINE_HEIGHT}" xml:space="preserve"'
        f' textLength="{length * CHARACTER_WIDTH:.1f}">{"".join(spans(line))}</text>\n'
        for at, (line, length) in enumerate(zip(lines, lengths, strict=True))
        if length
    ]
    return head + "".join(texts) + "</svg>\n"


if __name__ == "__main__":
    sys.stdout.write(draw(sys.argv[1], sys.stdin.read()))
