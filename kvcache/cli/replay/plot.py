"""The plot: hit ratio against DRAM, for each policy and the optimum.

Always true: capacities double from one point to the next, so that they stand at equal distances.
An SVG or HTML file stands alone: no script, no font, nothing that is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

OPTIMUM = "optimum"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000")
GREY = "#888"

WIDTH, HEIGHT = 800, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 540, 44, 340  # of the field


@dataclass(frozen=True, slots=True)
class Curves:
    """Ratios by capacity. Point ``marked`` is the capacity of the user, the next one its double."""

    title: str
    axis: str  # what capacities are of
    labels: Sequence[str]  # of capacities
    series: dict[str, list[float]]  # one ratio per capacity; of the optimum, and by policy
    marked: int

    def colours(self) -> dict[str, str]:
        """The colour of each series."""
        policies = [name for name in self.series if name != OPTIMUM]
        return {OPTIMUM: "#333"} | {
            name: COLOURS[at % len(COLOURS)] for at, name in enumerate(policies)
        }

    def doubling(self, name: str) -> tuple[float, float]:
        """The ratio of a series at the user's capacity, and at its double."""
        values = self.series[name]
        return values[self.marked], values[self.marked + 1]

    def ranked(self) -> list[str]:
        """The series, the best at the user's capacity first."""
        return sorted(self.series, key=lambda name: -self.series[name][self.marked])


def write(curves: Curves, path: Path) -> None:
    """Draw to ``path``, whose ending is .svg, .html or .png. Raises OSError."""
    if path.suffix == ".png":
        _png(curves, path)
    else:
        text = svg(curves) if path.suffix == ".svg" else html(curves)
        path.write_text(text, encoding="utf-8")


def ticks(most: float) -> list[float]:
    """Round ratios from 0 to ``most`` or just above, seven at most."""
    step = next((s for s in (0.01, 0.02, 0.05, 0.1) if most <= 6 * s), 0.2)
    count = 1
    while count * step < most - 1e-9:
        count += 1
    return [at * step for at in range(count + 1)]


def svg(curves: Curves) -> str:
    """A picture of 800 x 400, or higher."""
    height = max(HEIGHT, TOP + 60 + 36 * len(curves.series))  # of the legend, if that is long
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    font = 'font-family="system-ui, sans-serif" font-size="12"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            _text(LEFT, 24, f"{curves.title}: prefix hits by DRAM", 'font-size="15"'),
            *_field(curves),
            *_lines(curves),
            *_legend(curves),
            "</svg>\n",
        ]
    )


def _x(curves: Curves, at: int) -> float:
    return LEFT + (RIGHT - LEFT) * at / max(1, len(curves.labels) - 1)


def _y(curves: Curves, ratio: float) -> float:
    top = ticks(max(map(max, curves.series.values())))[-1]
    return BOTTOM - (BOTTOM - TOP) * ratio / top


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>'


def _field(curves: Curves) -> Iterator[str]:
    """Axes, and the user's capacity."""
    for ratio in ticks(max(map(max, curves.series.values()))):
        y = _y(curves, ratio)
        yield f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#e4e4e4"/>'
        yield _text(LEFT - 8, y + 4, f"{ratio:.0%}", 'text-anchor="end"')
    for at, label in enumerate(curves.labels):
        yours = ' font-weight="bold"' if at == curves.marked else ""
        yield _text(_x(curves, at), BOTTOM + 18, label, f'text-anchor="middle"{yours}')
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 42, curves.axis, 'text-anchor="middle"')
    x, twice = _x(curves, curves.marked), _x(curves, curves.marked + 1)
    area = f'x="{x:.1f}" y="{TOP}" width="{twice - x:.1f}" height="{BOTTOM - TOP}"'
    yield f'<rect {area} fill="#000" fill-opacity="0.06"/>'
    yield f'<path d="M{x:.1f} {TOP}V{BOTTOM}" stroke="{GREY}" stroke-width="1.5"/>'


def _lines(curves: Curves) -> Iterator[str]:
    for name, colour in curves.colours().items():
        points = [(_x(curves, at), _y(curves, v)) for at, v in enumerate(curves.series[name])]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = ' stroke-dasharray="5 4"' if name == OPTIMUM else ""
        yield (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashed}/>'
        )
        for (x, y), label, value in zip(points, curves.labels, curves.series[name], strict=True):
            said = escape(f"{name}, {label}: {value:.2%}")
            yield (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">'
                f"<title>{said}</title></circle>"
            )


def _legend(curves: Curves) -> Iterator[str]:
    """The series, and what doubling the user's capacity buys of each."""
    left, right, y = RIGHT + 24, WIDTH - 12, TOP + 12
    now, then = curves.labels[curves.marked], curves.labels[curves.marked + 1]
    yield _text(left, y, f"{now} doubled: {then}", 'font-weight="bold"')
    for at, name in enumerate(curves.ranked()):
        before, after = curves.doubling(name)
        colour, line = curves.colours()[name], y + 26 + 36 * at
        shown = name if len(name) <= 24 else "..." + name[-21:]
        yield _text(left, line, shown, f'fill="{colour}" font-weight="bold"')
        yield _text(left, line + 15, f"{before:.1%} to {after:.1%}", 'fill="#555"')
        gain = f"{100 * (after - before):+.1f} points"
        yield _text(right, line + 15, gain, 'text-anchor="end"')


def html(curves: Curves) -> str:
    """A page with the picture and its numbers."""
    head = "".join(f"<th>{escape(label)}</th>" for label in curves.labels)
    rows = "\n".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td>{value:.2%}</td>" for value in curves.series[name])
        + "</tr>"
        for name in curves.ranked()
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f"<title>{escape(curves.title)}: prefix hits by DRAM</title>\n"
        "<style>body{font:14px system-ui,sans-serif;margin:2em}td,th{padding:.2em .8em;"
        "text-align:right}table{border-collapse:collapse}tr{border-top:1px solid #ddd}"
        "svg{max-width:100%;height:auto}</style>\n"
        f"{svg(curves)}<p>{escape(curves.axis)}:</p>\n"
        f"<table>\n<tr><th></th>{head}</tr>\n{rows}\n</table>\n</html>\n"
    )


def _png(curves: Curves, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=150, layout="constrained")
    axes = figure.subplots()
    places = range(len(curves.labels))
    for name in curves.ranked():
        before, after = curves.doubling(name)
        axes.plot(
            places,
            [100 * value for value in curves.series[name]],
            "--o" if name == OPTIMUM else "-o",
            color=curves.colours()[name],
            markersize=4,
            label=f"{name}: {before:.1%} to {after:.1%} ({100 * (after - before):+.1f})",
        )
    axes.axvspan(curves.marked, curves.marked + 1, color="#eee")
    axes.axvline(curves.marked, color=GREY)
    axes.set_xticks(places, curves.labels)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(curves.axis)
    axes.set_ylabel("prefix hits, %")
    axes.set_title(f"{curves.title}: prefix hits by DRAM")
    axes.legend(
        title=f"{curves.labels[curves.marked]} doubled: {curves.labels[curves.marked + 1]}",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    figure.savefig(path)
