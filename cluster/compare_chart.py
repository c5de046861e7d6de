"""A chart of quality against bytes as inline SVG: logarithmic bytes, a line per method, bars of one deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .formatting import readable_bytes

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 98, 130, 18, 58
BESIDE = 3.0
# Okabe and Ito's colours, which differ for every kind of colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6f00", "#555555")
FULL_COLOUR = "#111111"


def colours(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour per method; `full` is black."""
    methods = dict.fromkeys(row["method"] for row in rows if row["method"] != "full")
    return {"full": FULL_COLOUR} | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(methods)}


def chart(rows: Sequence[Mapping[str, Any]], metric: str, label: str) -> str:
    """rows: those of results.json that were run and have the metric. Empty text without any."""
    shown = [row for row in rows if "unreachable" not in row and row[metric]["mean"] is not None]
    if not shown:
        return ""
    axes = _Axes(shown, metric)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)} against bytes">',
        *axes.grid(label),
    ]
    ends = []
    for i, (method, colour) in enumerate(colours(shown).items()):
        own = sorted((row for row in shown if row["method"] == method), key=lambda row: -row["embedding_bytes"])
        if not own:
            continue
        aside = BESIDE * ((i + 1) // 2) * (-1) ** i  # so that bars of one size do not cover each other
        points = [axes.point(row, aside) for row in own]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [axes.mark(row, colour, aside) for row in own]
        ends.append((points[0], method, colour))
    parts += _labels(ends)
    return "\n".join([*parts, "</svg>"])


class _Axes:
    def __init__(self, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
        self._metric = metric
        self._full: float | None = next((row[metric]["mean"] for row in rows if row["method"] == "full"), None)
        logs = [math.log10(row["embedding_bytes"]) for row in rows]
        self._low, self._high = min(logs) - 0.08, max(logs) + 0.08
        spread: list[tuple[float, float]] = [(row[metric]["mean"], row[metric]["deviation"] or 0.0) for row in rows]
        bottom, top = min(m - d for m, d in spread), max(m + d for m, d in spread)
        margin = 0.08 * (top - bottom) or 0.01
        self._bottom, self._top = bottom - margin, top + margin

    def x(self, size: float) -> float:
        return LEFT + (math.log10(size) - self._low) / (self._high - self._low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + float(self._top - value) / (self._top - self._bottom) * (HEIGHT - TOP - BOTTOM)

    def point(self, row: Mapping[str, Any], aside: float) -> tuple[float, float]:
        return self.x(row["embedding_bytes"]) + aside, self.y(row[self._metric]["mean"])

    def grid(self, label: str) -> list[str]:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = [f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}" class="plot"/>']
        for value in _round_steps(self._bottom, self._top):
            y = self.y(value)
            parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4f}</text>')
        for size in self._sizes():
            x = self.x(size)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" class="grid"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{readable_bytes(size)}</text>')
        if self._full is not None:
            y = self.y(self._full)
            parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="full"/>')
        middle = (LEFT + right) / 2
        parts.append(
            f'<text x="{middle:.0f}" y="{HEIGHT - 12}" text-anchor="middle" class="axis">'
            f"size of the exported embeddings, logarithmic</text>"
        )
        parts.append(
            f'<text transform="translate(16 {(TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle" '
            f'class="axis">{escape(label)}</text>'
        )
        return parts

    def _sizes(self) -> list[float]:
        """Halvings of the largest size; every second or third of them where they are many."""
        count = int((self._high - self._low) / math.log10(2)) + 1
        largest, every = 10 ** (self._high - 0.08), 1 + count // 8
        sizes = [largest / 2**i for i in range(0, count, every)]
        return [size for size in sizes if math.log10(size) >= self._low]

    def mark(self, row: Mapping[str, Any], colour: str, aside: float) -> str:
        x, y = self.point(row, aside)
        quality = row[self._metric]
        deviation = quality["deviation"] or 0.0
        top, bottom = self.y(quality["mean"] + deviation), self.y(quality["mean"] - deviation)
        name = "full" if row["method"] == "full" else f"{row['method']}, {row['actual_ratio']:.1f} times smaller"
        title = f"{name}: {quality['mean']:.5f}, {readable_bytes(row['embedding_bytes'])}"
        return (
            f'<g stroke="{colour}" fill="{colour}"><title>{escape(title)}</title>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if row["method"] == "full" else 4}"/></g>'
        )


def _labels(ends: Sequence[tuple[tuple[float, float], str, str]]) -> list[str]:
    """Names beside the plot, at the height of each line's largest point, moved apart where they would touch."""
    parts, last = [], -math.inf
    for (x, y), name, colour in sorted(ends, key=lambda end: end[0][1]):
        last = max(y, last + 16)
        edge = WIDTH - RIGHT + 14
        parts.append(
            f'<line x1="{x + 7:.1f}" y1="{y:.1f}" x2="{edge - 4}" y2="{last:.1f}" stroke="{colour}" class="lead"/>'
        )
        parts.append(f'<text x="{edge}" y="{last + 4:.1f}" style="fill: {colour}" class="name">{escape(name)}</text>')
    return parts


def _round_steps(low: float, high: float) -> list[float]:
    """Four to nine round values between two others."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 9)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]
