"""One page of a comparison that needs nothing else: for a hospital's director, a privacy officer, a printer."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


def page(found: Mapping[str, Any], notes: Sequence[str], pictures: Sequence[Path]) -> str:
    """HTML with its style and pictures inside; it loads nothing.

    Args:
        found: what `partway demo --json` or `partway compare --json` prints.
        notes: what the figures do not say, as sentences.
        pictures: PNG files, by the names under which the page shows them.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"mean": _mean, "site_mean": _site_mean}
    images = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in pictures}

    def picture(name: str, caption: str) -> Markup:
        source = Markup('<img alt="{}" src="data:image/png;base64,{}">').format(caption, images[name])
        return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(source, caption)

    template = environment.from_string((Path(__file__).parent / "page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        found=found,
        methods=list(found["methods"]),
        records=sum(site["records"] for site in found["sites"].values()),
        short=list(_in_short(found)),
        notes=notes,
        picture=picture,
        made=date.today().isoformat(),
    )


def _mean(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.mean(known):.3f}" if known else "–"


def _site_mean(by_site: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    costs = list(by_site.values())
    return {name: statistics.mean(cost[name] for cost in costs) for name in costs[0]}


def _in_short(found: Mapping[str, Any]) -> list[str]:
    """What a director would want to know, each with its figure."""
    methods = found["methods"]
    ours = [m for m in ("half_trained", "split") if m in methods]

    def reached(method: str) -> str:
        return f"{100 * statistics.mean(methods[method]['everybody']['balanced_accuracy']):.0f} %"

    def spent(method: str, key: str) -> float:
        return _site_mean(found["cost"][method])[key]

    together = ", ".join(f"{methods[m]['title']} {reached(m)}" for m in ours)
    sentences = [
        f"Of everybody's patients, a site's own model tells {reached('alone')} rightly, diagnosis by diagnosis in the "
        f"mean. Trained together: {together}; with all records in one place {reached('pooled')}; by federated "
        f"averaging {reached('fedavg')}.",
        "In Partway's runs no record left its site: what crosses to the server is what the first layers make of it "
        "and, except in the U-shape, its label.",
    ]
    if ours:
        factors = [f"{spent('fedavg', 'flops') / spent(m, 'flops'):.0f} ({methods[m]['title']})" for m in ours]
        sentences.append(f"At a site, federated averaging computes {' or '.join(factors)} times as much.")
    if "attack" in found:
        hits = 100 * found["attack"]["linkage_500"]
        sentences.append(
            f"That is not privacy by itself: a server that one site helps picks the right patient of 500 in {hits:.0f} "
            "of 100 cases (chance: 0.2)."
        )
    return sentences
