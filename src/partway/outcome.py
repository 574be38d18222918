"""What a party knows at the end of a job: its `Result`, with the weights that the terms leave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec
from torch import Tensor

from partway.assembly import Assembled
from partway.config import Job
from partway.data.predictions import told_of, written
from partway.data.schema import columns_of
from partway.plan.phases import at_sites, original
from partway.plan.plan import EACH, Copy, Plan, Turn
from partway.plan.predicting import told
from partway.plan.private import EMBEDDING, STEM, is_shared
from partway.report import Result, machine
from partway.train.scoring import AnyScores, read_figures
from partway.train.source import RecordSource
from partway.train.tallies import Evaluation, Told


def result_of(assembled: Assembled, seconds: float) -> Result:
    """What this party knows at the end."""
    party, job, evaluations = assembled.party, assembled.job, assembled.evaluations
    evaluation = next((e for e in evaluations.values() if e.all), next(iter(evaluations.values())))
    worker, me = party.worker, party.me
    scores = ("report", "report_own")
    told = [
        (turn, site, read_figures(evaluation.target, row)) for turn, site, row in worker.board if turn.flow in scores
    ]
    seen: list[tuple[str, int, AnyScores]] = [(t.records, t.epoch, s) for t, _, s in told if t.flow == "report"]
    seen += evaluation.all
    sites = {site: s for turn, site, s in told if turn.flow == "report_own"}
    if "test" in evaluation.own and assembled.plan.sites:
        sites[me] = evaluation.own["test"]
    weights = {} if job.predict else weights_of(assembled)
    return Result(
        job=msgspec.to_builtins(job),
        party=me,
        seconds=seconds,
        steps=party.session.steps[1],
        losses=[float(loss) for loss in worker.losses],
        validation=[{"epoch": epoch, **asdict(s)} for part, epoch, s in seen if part == "validation"],
        all=next((asdict(s) for part, _, s in seen if part == "test"), {}),
        targets=_by_target(evaluations) if len(evaluations) > 1 else {},
        sites={site: asdict(s) for site, s in sites.items()},
        cost={me: party.cost},
        plan=_words_of(assembled.plan, party.session.turns),
        holds=_holders(job, assembled.plan),
        ledgers={me: assembled.ledger.head.hex(), **{p: head.hex() for p, head in worker.accounts.items()}},
        machine=machine(job.training.threads),
        chosen={} if worker.stays is None else {me: "own" if worker.stays else "shared"},
        scaling=_scaling(worker.source),
        whole=weights.keys() == assembled.network.whole.state_dict().keys(),
        weights=weights,
        predictions=_predictions(assembled),
    )


def _predictions(assembled: Assembled) -> dict[str, str]:
    """What this party has been told of its records, by target."""
    job, worker, found = assembled.job, assembled.party.worker, {}
    for loss, target in assembled.targets.items():
        tally = worker.tallies.get(told(loss))
        if isinstance(tally, Told) and worker.source is not None:
            columns, records = columns_of(job), worker.source.records
            answer = told_of(columns, target, tally.outputs)
            found[target.name] = written(columns, target, answer, records.called, records.names)
    return found


def _by_target(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
    found = {e.target.name: s for e in evaluations.values() for part, _, s in e.all if part == "test"}
    return {name: asdict(scores) for name, scores in found.items()}


def _words_of(plan: Plan, turns: Sequence[Turn]) -> dict[str, Any]:
    """The plan, for people: what lives where, and what each flow that ran carries."""
    flows = dict.fromkeys(flow for turn in turns for flow in (turn.flow, turn.beside) if flow)
    used = {name for flow in flows for e in plan.edges(flow) for name in (e.source, e.target)}
    return {
        "segments": {s.name: s.at for s in plan.segments if s.name in used},
        "flows": {flow: [f"{edge} ({edge.kind})" for edge in plan.edges(flow)] for flow in flows},
        "turns": len(turns),
    }


def _scaling(source: object) -> dict[str, list[float]]:
    if not isinstance(source, RecordSource) or source.scaling is None:
        return {}
    mean, deviation = source.scaling
    return {"mean": mean.tolist(), "deviation": deviation.tolist()}


def weights_of(assembled: Assembled) -> dict[str, Tensor]:
    """The weights that this party may hold at the end, by their original names."""
    party, terms = assembled.party, _holders(assembled.job, assembled.plan)
    tensors: dict[str, Tensor] = {}
    for copy, segment in party.worker.segments.items():
        prefix = _prefix(assembled, copy) if original(copy.segment) in terms[party.me] else None
        if prefix is not None:
            tensors.update({prefix + name: tensor.cpu() for name, tensor in segment.tensors().items()})
    if (mine := tensors.pop(f"{EMBEDDING}.{party.me}.vector", None)) is not None:
        *_, bias = assembled.network.modules[STEM].state_dict()  # so the site's network is one like any other
        tensors[bias] = tensors[bias] + mine
    return tensors


def _prefix(assembled: Assembled, copy: Copy) -> str | None:
    """What the names of a copy's weights begin with in the result; None if it is no part of it."""
    name, (_, _, of) = original(copy.segment), copy.segment.partition(":")
    if is_shared(copy.segment):  # a site has chosen; the server keeps both
        return None if copy.lane else "shared."
    if assembled.job.concatenates and name == at_sites(assembled.plan)[0]:
        return f"bottoms.{of}." if of else None
    return f"{EMBEDDING}.{copy.lane}." if name == EMBEDDING else assembled.network.prefix(name)


def _holders(job: Job, plan: Plan) -> dict[str, list[str]]:
    """Who holds which segments at the end, by the job's `[result]`."""
    if not plan.sites:
        return {p: [n for n in plan.nets if plan.place(plan.copies(n)[0]) == p] for p in plan.parties}
    sites, hub = ([n for n in plan.nets if (plan[n].at == EACH) is home] for home in (True, False))
    hub += [EMBEDDING] if job.embeds else []
    at_site = sites + (hub if job.result.trunk == "everyone" else [])
    at_hub = hub + (sites if job.result.bottom == "everyone" else [])
    return {**dict.fromkeys(plan.sites, at_site), plan.hub: at_hub}
