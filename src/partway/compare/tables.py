"""A comparison on a screen of eighty columns: what each method reaches, what it costs a site, and what that is not."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.table import Table

from partway.compare.comparison import FEDAVG, TITLES, Comparison, mean
from partway.train.tuning import TRIED, total

SHORT = {
    "alone": "alone",
    "half_trained": "half",
    "split": "synchr",
    "u_shaped": "U-shape",
    "pooled": "pooled",
    "fedavg": "fedavg",
    "large_batch_sgd": "large",
}
"""Names for narrow columns."""
MEAN = "mean site"
FEW = 50
"""Test records; fewer say little of a site."""


def table(title: str, first: str, *columns: str) -> Table:
    """With a column for names, and one for each kind of figure."""
    made = Table(title=f"\n{title}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    made.add_column(first, no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation of what is known.

    >>> spread([0.8, None, 0.9]), spread([None])
    ('.850±.071', 'none')
    """
    known = [v for v in values if v is not None]
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{short(statistics.mean(known))}±{short(deviation)}" if known else "none"


def short(value: float | None) -> str:
    """Three places, without the zero before the point.

    >>> short(0.9121), short(1.0), short(None)
    ('.912', '1.000', 'none')
    """
    if value is None:
        return "none"
    return f"{value:.3f}".removeprefix("0") if value >= 0 else f"{value:.3f}"


def scores(found: Comparison) -> Table:
    """Every method: sites on their own patients, and their models on everybody's."""
    seeds = f"mean ± s.d. of {len(found.seeds)} seed{'s' if len(found.seeds) > 1 else ''}"
    title = f"{found.dataset}, test records, {seeds}\nown: mean of the sites on their own patients; all: on everybody's"
    made = table(f"{title}\nacc: accuracy; bal: balanced accuracy", "method", *("own bal", "own AUC"))
    for column in ("all acc", "all bal", "all AUC"):
        made.add_column(column, justify="right", no_wrap=True)
    for method in found.methods:
        own = (spread(found.own(method, figure)) for figure in ("balanced_accuracy", "macro_auc"))
        everybody = (
            spread(found.everybody(method, figure)) for figure in ("accuracy", "balanced_accuracy", "macro_auc")
        )
        made.add_row(TITLES[method], *own, *everybody)
    return made


def by_site(found: Comparison, figure: str, title: str) -> Table:
    """A row a site, a column a method: means of the seeds on the site's own test patients."""
    made = table(f"{title}, each site's own test patients", "site", "records", *(SHORT[m] for m in found.methods))
    for site, parts in found.sizes.items():
        row = (mean(found.own(method, figure, site)) for method in found.methods)
        made.add_row(site, f"{sum(parts.values()):,}", *map(short, row))
    small = [site for site, parts in found.sizes.items() if parts["test"] < FEW]
    for name, without in ((MEAN, []), (f"without {', '.join(small)}", small)):
        row = (mean(found.own(method, figure, without=without)) for method in found.methods)
        if without or name == MEAN:
            made.add_row(name, "", *map(short, row), style="bold")
    return made


def encodings(found: Comparison) -> Table:
    """Statistics of all sites against reference ranges with marks, on everybody's patients."""
    title = "inputs scaled by statistics of all sites, or by reference ranges with marks"
    title += "\n(plain loops, rates as above; half-trained by statistics is the real run)"
    made = table(title, "method", "acc", "with marks", "bal", "with marks ", "AUC", "with marks  ")
    for name in found.marked:
        row = []
        for figure in ("accuracy", "balanced_accuracy", "macro_auc"):
            row += [short(mean(found.everybody(name, figure))), spread(found.everybody_marked(name, figure))]
        made.add_row(TITLES.get(name, TITLES["fedavg"]), *row)
    return made


def costs(found: Comparison) -> Table:
    """Every method: what one run costs a mean site, and what the choice of its learning rate did besides."""
    made = table(
        "what one run costs a mean site (exch.: exchanges), and trying three learning rates",
        "method",
        *("MFLOP", "MB up", "MB down", "exch.", "tuning MFLOP", "MB"),
    )
    sites = len(found.sizes)
    for method in found.methods:
        run, search = (total(by.values()) for by in (found.cost(method), found.search(method)))
        made.add_row(
            TITLES[method],
            f"{run.flops / sites / 1e6:,.0f}",
            f"{run.bytes_up / sites / 1e6:.2f}",
            f"{run.bytes_down / sites / 1e6:.2f}",
            f"{run.exchanges / sites:,.0f}",
            f"{search.flops / sites / 1e6:,.0f}",
            f"{(search.bytes_up + search.bytes_down) / sites / 1e6:.1f}",
        )
    return made


def everything(found: Comparison) -> Iterator[Table]:
    """All tables."""
    yield scores(found)
    yield costs(found)
    yield by_site(found, "balanced_accuracy", "balanced accuracy")
    yield by_site(found, "macro_auc", "macro-AUC")
    if found.marked:
        yield encodings(found)


def notes(found: Comparison) -> Iterator[str]:
    """What the figures do and do not say, in sentences."""
    everybody = {m: found.everybody(m, "balanced_accuracy") for m in found.methods}
    balanced = {m: known for m, values in everybody.items() if (known := mean(values)) is not None}
    if "pooled" in balanced:
        apart = ", ".join(f"{TITLES[m]} {b - balanced['pooled']:+.3f}" for m, b in balanced.items() if m != "pooled")
        yield f"Balanced accuracy on everybody's patients, less that of pooled training: {apart}.{_noise(everybody)}"
    aucs = {site: mean(run.everybody[site].macro_auc for run in found.of("alone")) for site in found.sizes}
    if any(auc is not None for auc in aucs.values()):
        told = ", ".join(f"{site} {short(auc)}" for site, auc in aucs.items())
        together = ", ".join(f"{TITLES[m]} {short(mean(found.everybody(m, 'macro_auc')))}" for m in found.methods[1:])
        yield f"AUC on everybody's patients: one site's own model {told}; {together}."
    flops = {m: total(found.cost(m).values()).flops for m in found.methods}
    bytes_ = {m: sum(c.bytes_up + c.bytes_down for c in found.cost(m).values()) for m in found.methods}
    ours = [m for m in ("half_trained", "split", "u_shaped") if m in flops]
    factors = ", ".join(f"{TITLES[m]} {flops['fedavg'] / flops[m]:.1f}" for m in ours)
    yield f"Federated averaging computes so many times more at a site: {factors}. The server does the rest instead."
    raw = sum(found.raw().values()) / len(found.sizes)
    moved = ", ".join(f"{TITLES[m]} {bytes_[m] / len(found.sizes) / 1e6:.2f} MB" for m in (*ours, "fedavg"))
    yield f"The raw records, sent once, would be {raw / 1e6:.2f} MB a site: less than what learns together ({moved})."
    for figure, name in (("balanced_accuracy", "balanced accuracy"), ("macro_auc", "AUC")):
        gains = ((TITLES[m], site, _gain(found, m, site, figure)) for m in ours for site in found.sizes)
        worse = [f"{site} ({title} {gain:+.3f})" for title, site, gain in gains if gain is not None and gain < -0.0005]
        if worse:
            yield f"Worse than alone in {name} on their own patients: {', '.join(worse)}."
    blank = [site for site in found.sizes if mean(found.own("pooled", "macro_auc", site)) is None]
    if blank:
        yield (
            f"No figures of {', '.join(blank)}: no class has 3 positive and 3 negative test records there; they count "
            "among everybody's."
        )
    yield (
        f"Rates: {', '.join(f'{TITLES[m]} {found.rate(m):g}' for m in found.methods)}, each the best of three on "
        f"validation records of another division, tried for {TRIED:.0%} of the budget. Every method keeps its best "
        f"epoch or round by (balanced accuracy + AUC) / 2 on validation records. Federated averaging is the best of "
        f"{len(FEDAVG)} by the same rule: {found.name_of('fedavg').replace('_', ' ')}."
    )


def _noise(everybody: Mapping[str, Sequence[float | None]]) -> str:
    """How far seeds lie apart."""
    pooled = [v for v in everybody["pooled"] if v is not None]
    if len(pooled) < 2:
        return " One seed says nothing of chance."
    return f" Pooled seeds differ by {statistics.stdev(pooled):.3f} (s.d.): a difference of that size is no win."


def _gain(found: Comparison, method: str, site: str, figure: str) -> float | None:
    """Over training alone."""
    mine, own = (mean(found.own(m, figure, site)) for m in (method, "alone"))
    return None if mine is None or own is None else mine - own
