"""What would leave a site for one record, over a whole job: told from plan, network and the record, sending nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from partway import pki
from partway.assembly import HALF, Parts, network_of, optimizers_of, plan_of, schemas_of, shapes_of, take_left
from partway.blueprint import DTYPES
from partway.config import Job, Site, contents, read_job, read_job_file
from partway.data import matched
from partway.data.records import Records, statistics_of
from partway.data.schema import columns_of
from partway.errors import UsageError
from partway.model.segment import Segment
from partway.plan.phases import Schedule, original
from partway.plan.plan import Plan, Turn
from partway.policy import judge_job, judge_turns
from partway.protocol.messages import LetterKind, Post, Reason
from partway.protocol.net import Route, Task, compile
from partway.shapes import Shapes
from partway.shipped import Reader
from partway.site.releases import Releases
from partway.train.source import RecordSource
from partway.train.worker import Worker

_SERVER = "server"


@dataclass
class Leaving:
    """One kind of letter that this site would send."""

    what: str
    to: str
    how: str
    times: int
    """In the whole job, if the site had this record alone."""
    nbytes: int
    """Of each letter's tensors."""
    values: list[float] | None = None
    """The numbers themselves, for the record's first step, where another party could read them."""


@dataclass
class Preview:
    """What `site preview` shows."""

    site: str
    job: str
    schema: str
    records: dict[str, int] = field(default_factory=dict)
    """How many the schema finds in this site's file, for each part; all parties are told."""
    leaves: list[Leaving] = field(default_factory=list)
    objections: list[str] = field(default_factory=list)
    """Why this site's policy would refuse the job, as far as it can be told before the other sites have joined."""

    def words(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        train, validation, test = (f"{self.records.get(part, 0):,}" for part in ("train", "validation", "test"))
        counted = f"{train} records train, {validation} validate and {test} test"
        if unlabelled := self.records.get("unlabelled", 0):
            counted += f"; {unlabelled:,} have no label"
        lines = [
            f"By the schema {self.schema}, every party hears that {counted}",
            f"What would leave {self.site} in the job {self.job}, nothing being sent, for one record of each kind:",
        ]
        for row in self.leaves:
            lines.append(f"  {row.what} to {row.to}, {row.how}: {row.times} x {row.nbytes} bytes")
            if row.values is not None:
                lines.append("    " + ", ".join(f"{v:.6g}" for v in row.values))
        lines += [f"The policy refuses it: {words}" for words in self.objections]
        if not self.objections:
            lines.append("The policy allows it; group sizes are judged when all sites have joined.")
        return "\n".join(lines)


def preview(site: Site, home: Path, job_file: Path) -> Preview:
    """Reads this site's own files and a job, signed or not.

    Raises:
        ConfigError, DataError, TrustError, CutError: a file is wrong.
        Refused: the network's name is not allowed, so nothing more can be told.
    """
    job, operator = _job(site, home, job_file)
    me, policy = site.site.name, site.policy
    if job.laned:
        others = [name for name in job.sites if name != me] or ["another-site", "a-third-site"]
        job = msgspec.structs.replace(job, roster=dict.fromkeys(sorted([me, *others]), ""))
    found = Preview(me, job.job.name, columns_of(job).schema.name)
    found.objections += [o.words for o in judge_job(policy, me, job, operator) if o.reason is not Reason.ROSTER]
    (plan, schedule), schemas = plan_of(job, _SERVER), schemas_of(job, _SERVER)
    if me not in plan.parties:
        raise UsageError(f"{me} has no part in the job {job.job.name}")
    authority = contents(home / site.site.identity / "authority.pem") if job.shipped else b""
    network = network_of(job, policy, schemas, shipped=Reader(home / site.site.weights, authority))
    shapes = shapes_of(job, plan, network, schemas)
    turns = _turns(me, plan, schedule)
    released = Releases(home / site.site.folder).count
    found.objections += [o.words for o in judge_turns(policy, me, shapes, turns, released)]
    records = matched.read(site.predict if job.predict else site.data, home, job, me)
    found.records = records.sizes if records is not None else {}
    party = _Party(me, job, plan, shapes, network, records, home / site.site.folder)
    if records is not None or not job.laned:
        found.leaves = list(party.leaves(turns))
    return found


def _job(site: Site, home: Path, path: Path) -> tuple[Job, str]:
    if path.suffix != ".signed":
        operator = next(iter(site.policy.operators), "nobody")
        return read_job_file(path), operator
    opened = pki.open_job(contents(path), contents(home / site.site.identity / "authority.pem"))
    return read_job(opened.toml, str(path), opened.schema), opened.operator.name


def _turns(me: str, plan: Plan, schedule: Schedule) -> tuple[Turn, ...]:
    """Of a job in which this site has one record of each kind, and the others none; or all have the same one."""
    here = {party: not plan.sites or party == me for party in plan.holders}
    return schedule({p: dict.fromkeys(("train", "validation", "test"), int(mine)) for p, mine in here.items()})


@dataclass
class _Party:
    """This site in a job of one record, by itself."""

    me: str
    job: Job
    plan: Plan
    shapes: Shapes
    network: Parts
    records: Records | None
    earlier: Path
    """Where jobs before this one have left their folders."""

    def leaves(self, turns: tuple[Turn, ...]) -> Iterator[Leaving]:
        seen: dict[tuple[LetterKind, str, str, str], Leaving] = {}
        for turn in turns:
            for post, route in compile(self.plan, turn).letters.items():
                nbytes = self.shapes.of(turn, post, route.sender, route.receiver).nbytes
                if route.sender != self.me or not nbytes:
                    continue
                key = (post.kind, post.source.segment, post.target.segment, route.receiver)
                if key not in seen:
                    how = _how(self.job, self.shapes, post, route)
                    seen[key] = Leaving(_what(post), route.receiver, how, 0, nbytes, self.values(turn, post))
                seen[key].times += 1
        yield from seen.values()

    def values(self, turn: Turn, post: Post) -> list[float] | None:
        """What a real worker would put into a letter for the first record, with the network's present weights.

        They are first weights that nobody has trained, or, of a job that predicts, those that it would use. None for
        what is made of others' letters.
        """
        if post.kind not in (LetterKind.ACTIVATIONS, LetterKind.LABELS) or self.records is None:
            return None
        job, records, dtype = self.job, self.records, DTYPES[self.job.training.dtype]
        one, index = copy.copy(records), records.division["test" if job.predict else "train"]
        if records.present is not None:
            index = index[records.present[index]]
        one.division = dict.fromkeys(records.division, index[:1])
        source = RecordSource(one, b"", b"", dtype)
        segments = {c: Segment(self.network.modules[original(c.segment)], dtype) for c in self.plan.placed(self.me)}
        scaling = take_left(self.earlier, job, self.network, segments).scaling if job.predict and segments else {}
        if len(records.numeric):
            source.standardise(*((scaling[n] for n in ("mean", "deviation")) if scaling else statistics_of([records])))
        half = HALF[job.training.precision]
        worker = Worker(self.plan, self.shapes, segments, optimizers=optimizers_of(job), source=source, half=half)
        net, done = compile(self.plan, turn), set[Task]()
        worker.begin(0, turn, net)
        for task, work in net.tasks.items():
            if task.kind == "forward" and work.at == self.me and done.issuperset(work.needs):
                worker.do(task)
                done.add(task)
        if Task("forward", post.source) not in done:
            return None
        with torch.no_grad():
            return [float(v) for v in worker.body(post)["x"].reshape(-1)]


def _what(post: Post) -> str:
    kind = post.kind.name.lower()
    if post.kind is LetterKind.ACCOUNT:
        return "the head of the ledger"
    if post.kind is LetterKind.SQUARE:
        return "the square of a gradient's norm"
    if post.kind is LetterKind.EQUAL:
        return f"a digest of {post.source.segment}"
    if post.kind in (LetterKind.SHARE, LetterKind.STATE):
        return f"{kind} of {post.source.segment}"
    return f"{kind} ({post.source.segment} -> {post.target.segment})"


def _how(job: Job, shapes: Shapes, post: Post, route: Route) -> str:
    if shapes.reader(post, route.sender, route.receiver):
        return "sealed, so that the server forwards and cannot read it"
    if post.kind is LetterKind.SHARE and job.training.sums == "blind":
        return "masked, so that the server can add and not read it"
    return "in the clear for the receiver"
