"""The report's plots as inline SVG that takes its colours from the page, so that they fit light and dark alike.

Matplotlib is given one odd colour per role; in the SVG each is replaced by a CSS variable of the page. No plot
holds an address of anything outside the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any

import numpy as np

_ROLES = {"ink": "#010203", "muted": "#010204", "grid": "#010205", "live": "#010206", "base": "#010207"}
_ROLES |= {"bad": "#010208", "good": "#010209"}
INK, MUTED, GRID, LIVE, BASE, BAD, GOOD = _ROLES.values()

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}

_LANE_PT = 10
"""Height of a line of labels above the plot."""

_LETTER_SHARE = 0.0085
"""Width of a label's letter, of the plot's width."""

_MARKS = {
    "retrain": ("retrain", MUTED),
    "canary": ("canary", MUTED),
    "promoted": ("promoted", GOOD),
    "rolled_back": ("rolled back", BAD),
    "rejected": ("refused", BAD),
    "failed": ("failed", BAD),
}


def timeline(months: Sequence[Mapping[str, Any]], marks: Sequence[Mapping[str, Any]], unit: str) -> str:
    """AUC, money and regret by month, with what happened to the model's versions; empty without months."""
    if not months:
        return ""
    names = [str(m["month"]) for m in months]
    x = np.arange(len(names))
    placed = _placed(names, marks)
    lanes = _lanes(placed, len(names))
    above = _LANE_PT * (max(lanes, default=-1) + 1)
    with _styled() as figure_of:
        figure = figure_of((9, 6 + above / 72))
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[1.1, 1, 0.7])
        top.plot(x, _column(months, "auc"), color=LIVE, marker="o", markersize=4, linewidth=1.8, label="answered")
        top.plot(x, _column(months, "baseline_auc"), color=BASE, marker="o", markersize=3, label="baseline")
        top.set_title("AUC by month", pad=6 + above)
        top.legend(loc="lower right", ncols=2, bbox_to_anchor=(1, 1.04 + above / 130), borderaxespad=0)
        middle.bar(x - 0.19, _column(months, "usd") / 1000, 0.36, color=LIVE, label="answered")
        middle.bar(x + 0.19, _column(months, "baseline_usd") / 1000, 0.36, color=BASE, label="baseline")
        middle.set_title(f"Money lost by month, thousand {unit}")
        regret = _column(months, "regret_usd") / 1000
        bottom.bar(x, regret, 0.5, color=[BAD if r > 0 else GOOD for r in np.nan_to_num(regret)])
        bottom.axhline(0, color=MUTED, linewidth=0.8)
        bottom.set_title(f"Regret by month, thousand {unit}: above 0 something else would have cost less")
        bottom.set_xticks(x, names)
        bottom.set_xlim(-0.6, len(names) - 0.4)
        for axes in (top, middle, bottom):
            axes.grid(axis="x", visible=False)
        _draw_marks((top, middle, bottom), placed, lanes)
        figure.align_ylabels()
        figure.tight_layout(h_pad=1.2)
        return _svg(figure, "timeline")


def latency(bounds_ms: Sequence[float], counts: Sequence[int], quantiles: Mapping[str, float | None]) -> str:
    """Histogram of latencies, `counts[i]` between `bounds_ms[i]` and the next; empty without counts."""
    if not any(counts):
        return ""
    from matplotlib.ticker import LogLocator, NullLocator

    with _styled() as figure_of:
        figure = figure_of((5, 2.4))
        axes = figure.subplots()
        axes.stairs(counts, bounds_ms, fill=True, color=LIVE, alpha=0.8)
        axes.set_xscale("log")
        axes.set_xlabel("milliseconds")
        axes.set_ylabel("requests")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for name, value in quantiles.items():
            if value:
                axes.axvline(value, color=INK, linewidth=1, linestyle=(0, (4, 3)))
                axes.annotate(f"{name} {value:.3g}", (value, 1), (3, -9), color=INK, **_ON_TOP)
        figure.tight_layout()
        return _svg(figure, "latency")


_ON_TOP: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 8}


def histogram(values: Sequence[float], bins: int = 40) -> tuple[list[float], list[int]]:
    """Bounds and counts of values on a logarithmic scale."""
    known = np.asarray([v for v in values if v and v > 0], float)
    if not len(known):
        return [], []
    low, high = known.min(), max(known.max(), known.min() * 1.01)
    counts, bounds = np.histogram(known, np.geomspace(low, high, bins + 1))
    return bounds.tolist(), counts.tolist()


def _draw_marks(panels: Sequence[Any], marks: Sequence[tuple[float, str, str]], lanes: Sequence[int]) -> None:
    for (place, label, color), lane in zip(marks, lanes, strict=True):
        for axes in panels:
            axes.axvline(place, color=color, linewidth=1, linestyle=(0, (2, 2)))
        panels[0].annotate(label, (place, 1), (0, 2 + _LANE_PT * lane), color=color, ha="center", **_ON_TOP)


def _placed(names: Sequence[str], marks: Sequence[Mapping[str, Any]]) -> list[tuple[float, str, str]]:
    """(place, label, colour) of the marks that lie on the axis, from left to right."""
    found = []
    for mark in marks:
        place = _place(str(mark["at"]), names)
        label, color = _MARKS.get(str(mark["kind"]), (str(mark["kind"]), MUTED))
        if mark.get("version") is not None:
            label = f"{label} v{mark['version']}"
        if place is not None:
            found.append((place, label, color))
    return sorted(found)


def _lanes(marks: Sequence[tuple[float, str, str]], months: int) -> list[int]:
    """A line for each label, the lowest on which it does not run into its neighbour."""
    ends: list[float] = []
    lanes = []
    for place, label, _ in marks:
        half = (len(label) + 2) * _LETTER_SHARE * months / 2
        lane = next((i for i, end in enumerate(ends) if end <= place - half), len(ends))
        ends[lane : lane + 1] = [place + half]
        lanes.append(lane)
    return lanes


def _place(day: str, names: Sequence[str]) -> float | None:
    """Where a day lies on an axis that has one unit per month, the month's middle at its whole number."""
    month = day[:7]
    if month not in names:
        return None
    first = date.fromisoformat(f"{month}-01")
    length = ((first + timedelta(days=32)).replace(day=1) - first).days
    return names.index(month) - 0.5 + (date.fromisoformat(day[:10]) - first).days / length


def _column(months: Sequence[Mapping[str, Any]], name: str) -> Any:
    return np.array([np.nan if m.get(name) is None else m[name] for m in months], float)


class _styled:
    """Matplotlib without its global state: figures in our style, drawn by the SVG canvas."""

    def __enter__(self) -> Any:
        import matplotlib
        from matplotlib.figure import Figure

        self._context = matplotlib.rc_context(_STYLE)
        self._context.__enter__()
        return lambda size: Figure(figsize=size)

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(None, None, None)


def _svg(figure: Any, name: str) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[a-z_0-9.]+">', "<g>", svg)
    svg = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", svg)
    for role, color in _ROLES.items():
        svg = svg.replace(color, f"var(--{role})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
