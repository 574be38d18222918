"""Pictures of what came out, for people who would rather look than read. Needs matplotlib, of the extra `demo`.

Each is drawn from the plain data that `partway demo --json` and `partway compare --json` print.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "alone": "#8a8a8a",
    "half_trained": "#1b7837",
    "split": "#0b6e99",
    "u_shaped": "#6a51a3",
    "pooled": "#222222",
    "fedavg": "#e08214",
    "large_batch_sgd": "#b2182b",
}
_MARKS = {
    "alone": "o",
    "half_trained": "^",
    "split": "D",
    "u_shaped": "v",
    "pooled": "s",
    "fedavg": "P",
    "large_batch_sgd": "X",
}


def draw_all(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """`sites.png`, `costs.png` and `curves.png` in a folder."""
    pictures: dict[str, Callable[[Mapping[str, Any]], Any]] = {"sites": sites, "costs": costs, "curves": curves}
    paths = []
    for name, draw in pictures.items():
        figure = draw(found)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
        _pyplot().close(figure)
    return paths


def sites(found: Mapping[str, Any]) -> Any:
    """What each site gains: its own test patients' scores by method, and those of everybody's patients."""
    figure, panels = _pyplot().subplots(1, 2, figsize=(12, 5.6), layout="constrained")
    for axes, key, title in zip(
        panels, ("balanced_accuracy", "macro_auc"), ("balanced accuracy", "macro-AUC"), strict=True
    ):
        _rows(axes, found, key, title)
    panels[1].set_yticklabels([])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{found['dataset']}: what each site gains ({_seeds(found)}; small marks: each seed)")
    return figure


def _rows(axes: Any, found: Mapping[str, Any], key: str, title: str) -> None:
    """A row a site and one for everybody, a mark a method."""
    names = sorted(found["sites"], key=lambda s: -found["sites"][s]["records"])
    rows = {name: f"{name}\n{found['sites'][name]['records']:,} records" for name in names}
    methods = found["methods"]
    values = {
        (name, m): [v for v in methods[m]["sites"][name][key] if v is not None] for name in names for m in methods
    }
    values |= {("everybody", m): [v for v in methods[m]["everybody"][key] if v is not None] for m in methods}
    rows["everybody"] = "everybody's\npatients"
    known = [statistics.mean(v) for (_, m), v in values.items() if v and m != "alone"]
    least = max(0.0, min(known) - 0.08)
    for place, name in enumerate(rows):
        for number, method in enumerate(methods):
            height = place + 0.72 * (number / max(1, len(methods) - 1) - 0.5)
            own = values[name, method]
            if not own:
                continue
            mean, colour = statistics.mean(own), COLOURS[method]
            label = methods[method]["title"] if place == 0 else None
            if mean < least:
                axes.plot(least, height, _MARKS[method], color=colour, label=label, markersize=6, clip_on=False)
                axes.text(least, height, f"  ◄ {mean:.2f}", color=colour, va="center", fontsize=8)
                continue
            axes.plot(own, [height] * len(own), ".", color=colour, alpha=0.4, markersize=4)
            axes.plot(mean, height, _MARKS[method], color=colour, label=label, markersize=6)
        if place:
            axes.axhline(place - 0.5, color="#e5e5e5", linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows.values()))
    axes.invert_yaxis()
    axes.set_xlim(least - 0.005, 1.005)
    axes.set_xlabel(f"{title}, own test patients")
    _plain(axes)


def costs(found: Mapping[str, Any]) -> Any:
    """What each method reaches, and beside it what one run of it costs a mean site."""
    figure, panels = _pyplot().subplots(
        1, 4, figsize=(12, 3.9), layout="constrained", sharey=True, width_ratios=(1.2, 1, 1, 1)
    )
    methods = list(found["cost"])
    told = {m: found["methods"][m]["everybody"]["balanced_accuracy"] for m in methods}
    reached = {m: [v for v in values if v is not None] or [0.0] for m, values in told.items()}
    for place, method in enumerate(methods):
        values, colour = reached[method], COLOURS[method]
        panels[0].plot(values, [place] * len(values), ".", color=colour, alpha=0.5, markersize=5)
        panels[0].plot(statistics.mean(values), place, _MARKS[method], color=colour, markersize=8)
        panels[0].text(1.02, place, f"{statistics.mean(values):.3f}", va="center", fontsize=9)
    panels[0].set_xlim(min(map(min, reached.values())) - 0.03, 1.0)
    panels[0].set_xlabel("balanced accuracy,\neverybody's patients")
    panels[0].set_yticks(range(len(methods)), [found["methods"][m]["title"] for m in methods])
    panels[0].invert_yaxis()
    what = {"flops": ("computation, MFLOP", 1e6), "bytes": ("both ways, MB", 1e6), "exchanges": ("exchanges", 1)}
    for axes, (key, (title, unit)) in zip(panels[1:], what.items(), strict=True):
        spent = {m: statistics.mean(_of(c, key) for c in found["cost"][m].values()) / unit for m in methods}
        some = [v for v in spent.values() if v]
        for place, method in enumerate(methods):
            value = spent[method]
            axes.barh(place, value or min(some) / 2, color=COLOURS[method] if value else "none", height=0.6)
            words = f"{value:,.2f}".rstrip("0").rstrip(".") if value < 10 else f"{value:,.0f}"
            axes.text(value or min(some) / 2, place, f" {words}" if value else " none", va="center", fontsize=9)
        axes.set_xscale("log")
        axes.set_xlim(min(some) / 2, max(some) * 12)
        axes.set_xlabel(f"{title}\n(mean site, one run, log.)")
    for axes in panels:
        axes.grid(axis="x", color="#eeeeee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.minorticks_off()
    figure.suptitle(f"{found['dataset']}: what each method reaches, and what it costs a site ({_seeds(found)})")
    return figure


def _of(cost: Mapping[str, int], key: str) -> int:
    return cost["bytes_up"] + cost["bytes_down"] if key == "bytes" else cost[key]


def curves(found: Mapping[str, Any]) -> Any:
    """How each method learns: its value on validation records at each look, and the loss where one network learns."""
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for method, runs in found["validation"].items():
        looks = [statistics.mean(at) for run in runs for at in [list(v) for v in zip(*run.values(), strict=True)]]
        length = len(next(iter(runs[0].values())))
        mean = [statistics.mean(looks[n::length]) for n in range(length)]
        share = [(n + 1) / length for n in range(length)]
        left.plot(share, mean, color=COLOURS[method], label=found["methods"][method]["title"], linewidth=1.6)
    left.set_xlabel("share of the budget spent (epochs or rounds)")
    left.set_ylabel("(balanced accuracy + AUC) / 2, validation")
    left.legend(frameon=False, fontsize=9)
    for method in ("pooled", "split", "half_trained"):
        if found["losses"].get(method) and found["losses"][method][0]:
            mean = [statistics.mean(step) for step in zip(*found["losses"][method], strict=False)]
            style = "--" if method == "split" else "-"
            title = found["methods"][method]["title"] + (", at the server" if method == "half_trained" else "")
            smooth = _smooth(mean, max(1, len(mean) // 60))
            share = [(n + 1) / len(smooth) for n in range(len(smooth))]
            right.plot(share, smooth, style, color=COLOURS[method], label=title, linewidth=1.6)
    right.set_xlabel("share of the steps")
    right.set_ylabel("training loss, running mean")
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        _plain(axes)
    figure.suptitle(f"{found['dataset']}: how they learn (mean of {_seeds(found)})")
    return figure


def _seeds(found: Mapping[str, Any]) -> str:
    count = len(found["seeds"])
    return f"{count} seed{'s' if count > 1 else ''}"


def _plain(axes: Any) -> None:
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(values: Sequence[float], width: int) -> list[float]:
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
