"""Where a job's network can be cut and what each cut costs, as a table and as a picture: the body of `partway plan`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from partway.blueprint import DTYPES, configured, cuts_of, network_of_terms, owned
from partway.config import Job, of_any_size
from partway.data.records import Schema
from partway.errors import UsageError
from partway.model.cache import captured
from partway.model.capture import call_of
from partway.model.cut import Whole
from partway.model.cuts import Place, cuts
from partway.model.segment import has_batchnorm
from partway.plan.plan import Plan

COLOURS = ("#1b7837", "#0b6e99", "#6a51a3", "#e08214", "#8a8a8a")
"""Of the parties' segments, in order."""
FORBIDDEN = "#c9c9c9"


@dataclass(frozen=True)
class Survey:
    """A job's network at all its places."""

    job: Job
    places: list[Place]
    segments: list[tuple[str, str]]
    """Of each piece: the segment, and who runs it."""
    marks: list[int]
    """Where the job cuts, as numbers of `places`."""
    mixes: str | None
    """The first BatchNorm."""

    def words(self) -> dict[str, Any]:
        """All of it as plain data."""
        rows = [
            {
                "after": place.after,
                "others": list(place.others),
                "why_not": place.why_not,
                "crosses": [
                    {"name": c.name, "dtype": c.dtype, "shape": list(c.shape), "gradient": c.gradient}
                    for c in place.crosses
                ],
                "used_by": list(place.used_by),
                "bytes_up": place.bytes_up,
                "bytes_down": place.bytes_down,
                "ratio": round(place.ratio, 4),
                "parameters": [place.before.parameters, place.behind.parameters],
                "forward_flops": [place.before.forward, place.behind.forward],
                "backward_flops": [place.before.backward, place.behind.backward],
                "job_cuts_here": number in self.marks,
            }
            for number, place in enumerate(self.places)
        ]
        return {"places": rows, "segments": [list(pair) for pair in self.segments], "batchnorm": self.mixes}

    def text(self) -> str:
        """The table, for a person."""
        told = [" + ".join(f"{c.dtype}[{', '.join(map(str, c.shape))}]" for c in p.crosses) for p in self.places]
        wide = [max(map(len, column), default=0) + 2 for column in ([p.after for p in self.places] + ["after"], told)]
        figures = f"{'KiB up':>9}{'KiB down':>10}{'x input':>9}{'% FLOPs':>9}{'% param.':>10}"
        lines = [f"  {'after':<{wide[0]}}{'crosses':<{wide[1]}}{figures}"]
        for number, (place, crosses) in enumerate(zip(self.places, told, strict=True)):
            mark = "> " if number in self.marks else "  "
            spent = [place.before.forward + place.before.backward, place.behind.forward + place.behind.backward]
            share = 100 * spent[0] / max(sum(spent), 1)
            held = 100 * place.before.parameters / max(place.before.parameters + place.behind.parameters, 1)
            figures = f"{place.bytes_up / 1024:>9,.2f}{place.bytes_down / 1024:>10,.2f}{place.ratio:>9.2f}"
            lines.append(f"{mark}{place.after:<{wide[0]}}{crosses:<{wide[1]}}{figures}{share:>9.1f}{held:>10.1f}")
            if place.why_not:
                lines.append(f"    no: {place.why_not}")
        lines.append(f"For one record. Shares are of what stands before the cut. > is where {self.job.job.name} cuts:")
        lines += [f"  {name}: {party}" for name, party in self.segments]
        known = {path for place in self.places for path in (place.after, *place.others)}
        network = self.job.network
        lost = [path for path in network.cut if path not in known] if network else []
        lines += [f"The job cuts after `{path}`, which is no place." for path in lost]
        if self.mixes:
            lines.append(
                f"`{self.mixes}` is a BatchNorm, whose statistics differ between sites, so that no site may share it; "
                "[network] group_norm = 4 puts GroupNorm in the place of each."
            )
        return "\n".join(lines)


def survey(job: Job, schema: Schema) -> Survey:
    """Every place of a job's network.

    Raises:
        UsageError: each segment has a network of its own, so that there is nothing to cut.
        CutError: the network cannot be captured.
    """
    if job.network is None:
        raise UsageError(f"{job.job.name}: each segment has a network of its own, and none is cut")
    plan = configured(job)
    allowed = of_any_size(job.builds)
    dtype = DTYPES[job.training.dtype]
    whole = network_of_terms(job.network, allowed).to(dtype)
    example = torch.randn(4, *schema.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    places = cuts(whole, example, may_cross=job.network.may_cross)
    known = {path: number for number, place in enumerate(places) for path in (place.after, *place.others)}
    marks = [known[path] for path in cuts_of(job, whole) if path in known]
    if owned(plan) and len(marks) == len(plan.nets) - 1:
        held, may_cross = Whole(whole, captured(whole, call_of(example))[0]), job.network.may_cross
        places = [_moved(held, plan, places, marks, number, may_cross) for number in range(len(places))]
    return Survey(job, places, [(name, _party(plan, name)) for name in plan.nets], marks, has_batchnorm(whole))


def _moved(
    whole: Whole, plan: Plan, places: list[Place], marks: list[int], number: int, may_cross: Collection[str]
) -> Place:
    """A place as the job's nearest cut would find it there: what no two parties may share, the pieces of one may."""
    nearest = min(marks, key=lambda mark: abs(mark - number))
    after = [places[n].after for n in sorted({*marks} - {nearest} | {number})]
    return replace(places[number], why_not=whole.look(after, owned(plan), may_cross)[1])


def _party(plan: Plan, name: str) -> str:
    at = {plan.place(copy) for copy in plan.copies(name)}
    return "each site" if plan[name].laned and at != {plan.hub} else ", ".join(sorted(at))


def draw(found: Survey, path: Path) -> None:
    """The network from left to right, in the colours of who runs what: what uses what, and what a cut would send."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = found.places
    figure, (graph, bars) = pyplot.subplots(
        2,
        figsize=(min(max(8.0, 0.16 * len(places) + 4), 24.0), 7.2),
        height_ratios=(2, 3),
        sharex=True,
        layout="constrained",
    )
    _draw_graph(found, graph)
    _draw_bars(found, bars)
    figure.suptitle(f"{found.job.job.name}: who runs what, and what each cut would send")
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_graph(found: Survey, axes: Any) -> None:
    """A dot for what stands before each place, and an arc to all that uses what it makes; dark where it is cut."""
    from matplotlib.patches import Arc

    places, highest = found.places, 1
    for number, place in enumerate(places):
        for user in place.used_by:
            cut = any(number <= mark < user for mark in found.marks)
            style: dict[str, Any] = {
                "color": "#222222" if cut else "#9a9a9a",
                "lw": 1.8 if cut else 0.8,
                "zorder": 2 if cut else 1,
            }
            if user == number + 1:
                axes.plot([number, user], [0, 0], **style)
            else:
                wide = user - number
                axes.add_patch(Arc(((number + user) / 2, 0), wide, wide, theta1=0, theta2=180, **style))
                highest = max(highest, wide)
    owner = [sum(n > mark for mark in found.marks) for n in range(len(places) + 1)]
    size = max(12, min(90, 3000 / len(owner)))
    axes.scatter(range(len(owner)), [0] * len(owner), s=size, c=[COLOURS[o % len(COLOURS)] for o in owner], zorder=3)
    for mark in found.marks:
        axes.axvline(mark + 0.5, color="#222222", lw=1.2)
    axes.set_ylim(-0.06 * highest, 0.53 * highest)
    axes.set_axis_off()


def _draw_bars(found: Survey, axes: Any) -> None:
    """Bytes that a cut at each place would send."""
    places = found.places
    owner = [sum(n > mark for mark in found.marks) for n in range(len(places))]
    heights = [max(place.bytes_up / 1024, 1e-3) for place in places]
    for number, (name, party) in enumerate(found.segments):
        own = [n for n in range(len(places)) if owner[n] == number]
        legal = [n for n in own if not places[n].why_not]
        colour = COLOURS[number % len(COLOURS)]
        axes.bar(legal, [heights[n] for n in legal], color=colour, width=0.85)
        axes.scatter([], [], color=colour, marker="s", s=60, label=f"{name}: {party}")  # also one that has no bar
        if own:
            axes.axvspan(own[0] - 0.5, own[-1] + 0.5, color=colour, alpha=0.08, lw=0)
    barred = [n for n, place in enumerate(places) if place.why_not]
    axes.bar(
        barred, [heights[n] for n in barred], color=FORBIDDEN, width=0.85, label="no legal cut" if barred else None
    )
    for mark in found.marks:
        axes.axvline(mark + 0.5, color="#222222", lw=1.2)
        axes.annotate(
            f"cut after {places[mark].after}",
            (mark + 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -4),
            textcoords="offset points",
            rotation=90,
            va="top",
            fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1},
        )
    raw = places[0].input_bytes / 1024 if places else 0
    axes.axhline(raw, color="#b2182b", lw=1, ls="--", label=f"a record itself: {raw:,.2f} KiB")
    if max(heights, default=1) > 300 * min(heights, default=1):
        axes.set_yscale("log")
    axes.set_ylabel("KiB that would cross for a record")
    step = max(1, len(places) // 40)
    shown = range(0, len(places), step)
    names = [*(places[n].after for n in shown), "the end"]
    axes.set_xticks([*shown, len(places)], names, rotation=90, fontsize=7)
    axes.set_xlim(-0.6, len(places) + 0.6)
