"""Pictures of what came out, for people who would rather look than read. Needs matplotlib, of the extra `demo`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"alone": "#8a8a8a", "split": "#0b6e99", "pooled": "#e08214"}
_MARKS = {"alone": "o", "split": "D", "pooled": "s"}


def draw(outcome: Mapping[str, Any], path: Path) -> None:
    """The demo on one page: each site's scores alone, split and pooled, and how the loss fell.

    Args:
        outcome: what `partway demo --json` prints.
        path: where the PNG goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.4), width_ratios=(1, 1, 0.9), layout="constrained")
    _sites(panels[0], outcome, "balanced_accuracy", "balanced accuracy", 0.3)
    _sites(panels[1], outcome, "macro_auc", "macro-AUC", 0.88)
    panels[0].legend(loc="lower left", frameon=False)
    panels[1].set_yticklabels([])
    _curves(panels[2], outcome["losses"])
    for axes in panels:
        axes.grid(axis="x" if axes is not panels[2] else "both", color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    seeds, steps = len(outcome["seeds"]), outcome["equality"]["steps"]
    title = f"Five sites and a server, processes of their own over mutual TLS, on real thyroid records: {seeds} seeds"
    figure.suptitle(title, fontsize=12)
    linked = round(100 * outcome["attack"]["linkage_500"])
    figure.supxlabel(
        f"{steps} float64 steps stay within {outcome['equality']['parameters']:.0e} of pooled training. "
        f"Splitting alone is not privacy: the right patient of 500 is picked in {linked} of 100 cases.",
        fontsize=9.5,
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _sites(axes: Any, outcome: Mapping[str, Any], key: str, title: str, least: float) -> None:
    """A row a site, a mark a method; what lies below `least` is written at the edge."""
    sites = sorted(outcome["sites"], key=lambda s: -outcome["sites"][s]["records"])
    for offset, method in zip((-0.24, 0, 0.24), ("alone", "split", "pooled"), strict=True):
        for place, site in enumerate(sites):
            values = [v for v in outcome["methods"][method]["sites"][site][key] if v is not None]
            if not values:
                continue
            mean, height, colour = statistics.mean(values), place + offset, COLOURS[method]
            label = method if place == 0 else None
            if mean < least:
                axes.text(least, height, f"◄ {mean:.2f}", color=colour, va="center", fontsize=9)
                continue
            axes.plot(values, [height] * len(values), ".", color=colour, alpha=0.45, markersize=5)
            axes.plot(mean, height, _MARKS[method], color=colour, label=label, markersize=7)
    axes.set_yticks(range(len(sites)), [f"{site}\n{outcome['sites'][site]['records']:,} records" for site in sites])
    axes.invert_yaxis()
    axes.set_xlim(least, 1.01)
    axes.set_xlabel(f"{title}, own test patients (dots: each seed)")


def _curves(axes: Any, losses: Mapping[str, Sequence[Sequence[float]]]) -> None:
    for method, style in (("pooled", "-"), ("split", "--")):
        mean = [statistics.mean(step) for step in zip(*losses[method], strict=True)]
        axes.plot(_smooth(mean), style, color=COLOURS[method], label=method, linewidth=2)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (mean of seeds, of 10 steps)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _smooth(values: Sequence[float], width: int = 10) -> list[float]:
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]
