"""Draws the hit ratio of each policy and of the optimum against DRAM, as SVG.

Invariants: capacities double from one point to the next, so points are at equal distances; the file
needs no script, no font and nothing from a network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

OPTIMUM = "optimum"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000")
_GREY = "#888"

# In pixels. A longer legend makes the picture higher.
_WIDTH, _MIN_HEIGHT = 800, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 540, 44, 340  # of the chart
_LEGEND_ROW = 36


@dataclass(frozen=True, slots=True)
class HitRatioPlot:
    """Hit ratios by capacity.

    Attributes:
        title: what was replayed.
        axis: the label of the axis of capacities.
        labels: of the capacities.
        series: for the optimum and each policy, a ratio per capacity.
        marked: the position of the user's capacity; the next one is its double.
    """

    title: str
    axis: str
    labels: Sequence[str]
    series: dict[str, list[float]]
    marked: int

    def colours(self) -> dict[str, str]:
        """Return the colour of each series."""
        policies = [name for name in self.series if name != OPTIMUM]
        return {OPTIMUM: "#333"} | {
            name: _COLOURS[at % len(_COLOURS)] for at, name in enumerate(policies)
        }

    def before_and_after_doubling(self, name: str) -> tuple[float, float]:
        """Return the ratios of a series at the user's capacity and at its double."""
        values = self.series[name]
        return values[self.marked], values[self.marked + 1]

    def ranked(self) -> list[str]:
        """Return the names of the series, the best at the user's capacity first."""
        return sorted(self.series, key=lambda name: -self.series[name][self.marked])

    def ticks(self) -> list[float]:
        """Return the ratios of the horizontal lines, from 0 to the highest ratio or just above."""
        return ticks(max(map(max, self.series.values())))

    def x(self, at: int) -> float:
        """Return where the capacity at a position is, in pixels."""
        return _LEFT + (_RIGHT - _LEFT) * at / max(1, len(self.labels) - 1)

    def y(self, ratio: float) -> float:
        """Return where a ratio is, in pixels."""
        return _BOTTOM - (_BOTTOM - _TOP) * ratio / self.ticks()[-1]


def ticks(highest: float) -> list[float]:
    """Return at most seven round ratios, from 0 to ``highest`` or just above."""
    step = next((s for s in (0.01, 0.02, 0.05, 0.1) if highest <= 6 * s), 0.2)
    count = 1
    while count * step < highest - 1e-9:
        count += 1
    return [at * step for at in range(count + 1)]


def svg(plot: HitRatioPlot) -> str:
    """Return the picture."""
    height = max(_MIN_HEIGHT, _TOP + 60 + _LEGEND_ROW * len(plot.series))
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    font = 'font-family="system-ui, sans-serif" font-size="12"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
            f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
            _text(_LEFT, 24, f"{plot.title}: prefix hits by DRAM", 'font-size="15"'),
            *_axes(plot),
            *_lines(plot),
            *_legend(plot),
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(text)}</text>'


def _axes(plot: HitRatioPlot) -> Iterator[str]:
    """Yield the axes, and the field between the user's capacity and its double."""
    for ratio in plot.ticks():
        y = plot.y(ratio)
        yield f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" stroke="#e4e4e4"/>'
        yield _text(_LEFT - 8, y + 4, f"{ratio:.0%}", 'text-anchor="end"')
    for at, label in enumerate(plot.labels):
        weight = ' font-weight="bold"' if at == plot.marked else ""
        yield _text(plot.x(at), _BOTTOM + 18, label, f'text-anchor="middle"{weight}')
    yield _text((_LEFT + _RIGHT) / 2, _BOTTOM + 42, plot.axis, 'text-anchor="middle"')
    x, doubled_x = plot.x(plot.marked), plot.x(plot.marked + 1)
    area = f'x="{x:.1f}" y="{_TOP}" width="{doubled_x - x:.1f}" height="{_BOTTOM - _TOP}"'
    yield f'<rect {area} fill="#000" fill-opacity="0.06"/>'
    yield f'<path d="M{x:.1f} {_TOP}V{_BOTTOM}" stroke="{_GREY}" stroke-width="1.5"/>'


def _lines(plot: HitRatioPlot) -> Iterator[str]:
    """Yield a line for each series, and a point with its value for each capacity."""
    for name, colour in plot.colours().items():
        points = [(plot.x(at), plot.y(ratio)) for at, ratio in enumerate(plot.series[name])]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = ' stroke-dasharray="5 4"' if name == OPTIMUM else ""
        yield (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashed}/>'
        )
        for (x, y), label, ratio in zip(points, plot.labels, plot.series[name], strict=True):
            title = escape(f"{name}, {label}: {ratio:.2%}")
            yield (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">'
                f"<title>{title}</title></circle>"
            )


def _legend(plot: HitRatioPlot) -> Iterator[str]:
    """Yield the name of each series, and its gain when the user's capacity is doubled."""
    left, right, y = _RIGHT + 24, _WIDTH - 12, _TOP + 12
    capacity, doubled = plot.labels[plot.marked], plot.labels[plot.marked + 1]
    yield _text(left, y, f"{capacity} doubled: {doubled}", 'font-weight="bold"')
    for at, name in enumerate(plot.ranked()):
        before, after = plot.before_and_after_doubling(name)
        colour, line = plot.colours()[name], y + 26 + _LEGEND_ROW * at
        short_name = name if len(name) <= 24 else "..." + name[-21:]
        yield _text(left, line, short_name, f'fill="{colour}" font-weight="bold"')
        yield _text(left, line + 15, f"{before:.1%} to {after:.1%}", 'fill="#555"')
        gain = f"{100 * (after - before):+.1f} points"
        yield _text(right, line + 15, gain, 'text-anchor="end"')
