"""Does with torch what a step asks: forward, backward, share, add, load, square, norm, update, give and take.

It looks at the plan for shapes and neighbours, never for who it is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from partway.cost import Cost
from partway.errors import JobFailed, OtherRecords, PeerError
from partway.model.segment import Segment
from partway.plan.plan import ONE, Copy, Optimizing, Plan, Turn
from partway.privacy.blind_sum import ClearSum, Numbers, Words, add
from partway.protocol.messages import LetterKind, Post
from partway.protocol.net import Net, Task, squared
from partway.shapes import Shapes
from partway.train.baselines import OptimizerOf
from partway.train.scale import LossScale
from partway.train.source import RecordSource, Shelf
from partway.train.stopping import Verdict
from partway.train.tallies import Tally
from partway.train.targets import Loss, cross_entropy
from partway.train.tied import Places, counted_twice, meet

STATE = "optimizer."
"""Before the names of what an optimiser keeps, in a letter with weights."""


class Sums(Protocol):
    """This party's half of a sum over sites: `privacy.blind_sum` has both."""

    def prepare(self, turn: int, segment: str, numbers: int, dtype: np.dtype) -> None: ...

    def mask(self, turn: int, segment: str, share: Numbers) -> Words | Numbers: ...

    def spoil(self, turn: int, segment: str, numbers: int, dtype: np.dtype) -> Words | Numbers: ...

    def unmask(self, turn: int, segment: str, total: Any, dtype: np.dtype) -> Numbers: ...


class Worker:
    """One party's segments, optimisers and tensors in flight.

    Args:
        segments: the copies that live at this party.
        optimizers: each makes the optimiser of a unit, a party's copies of one lane, from their flat parameters.
        source: its records, if it has any.
        stores: where released activations go here, by segment.
        tallies: what each tally counts here.
        judges: what a look at a tally's newest scores says here.
        better: whether one tally's newest scores are better than another's here.
        reports: figures that a tally tells, shape (1, n), float64.
        account: the head of this party's ledger, 32 bytes.
        losses: of segments that have one of their own.
        draws: seeds what a segment draws in a forward, from turn, micro-batch and copy.
        tied: weights that several segments share.
        half: every forward runs under `torch.autocast` to this type; weights, updates and sums do not.
    """

    def __init__(
        self,
        plan: Plan,
        shapes: Shapes,
        segments: Mapping[Copy, Segment],
        *,
        optimizers: Mapping[Optimizing, OptimizerOf],
        source: RecordSource | None = None,
        stores: Mapping[str, Shelf] | None = None,
        tallies: Mapping[str, Tally] | None = None,
        judges: Mapping[str, Callable[[], Verdict]] | None = None,
        better: Callable[[str, str], bool] | None = None,
        reports: Mapping[str, Callable[[], Tensor]] | None = None,
        account: Callable[[], bytes] | None = None,
        draws: Callable[[int, int, Copy], int] | None = None,
        losses: Mapping[str, Loss] | None = None,
        half: torch.dtype | None = None,
        tied: Sequence[Places] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.plan, self.shapes, self.segments, self.source = plan, shapes, dict(segments), source
        self.stores, self.tallies, self.reports = dict(stores or {}), dict(tallies or {}), dict(reports or {})
        self.sums: Sums | None = None
        """Blind or clear; set once keys are agreed, None at a party without shared copies."""
        self.cost = Cost()
        self.losses: list[Tensor] = []
        """The loss of each step so far, over its micro-batches, at a party that has the labels."""
        self.board: list[tuple[Turn, str, Tensor]] = []
        """Figures that sites have told: the turn, the site, shape (n,)."""
        self.accounts: dict[str, bytes] = {}
        """Heads of the other parties' ledgers, at the hub."""
        self._judges, self._makers, self._account_head, self._draws = dict(judges or {}), optimizers, account, draws
        self._better = better
        self.stays: bool | None = None
        """What a choice has come to here: whether what it was about has stayed."""
        self._device, self._half, self._tied = torch.device(device), half, tied
        self.loss: Loss = cross_entropy
        """The turn's divisor makes it a mean."""
        self._own_losses = dict(losses or {})
        self._optimizers: dict[tuple[Optimizing, Copy, tuple[str, ...]], torch.optim.Optimizer] = {}
        self._scales: dict[tuple[Optimizing, str], LossScale] = {}
        """Of each optimiser and, where lanes train apart, each lane."""
        self._handed: dict[Copy, dict[str, Tensor]] = {}
        """Optimiser states that have come with weights, until the next update."""
        self._lockers: dict[Copy, dict[str, Tensor]] = {}
        """What a site has sealed for another, until that one's turn."""
        self._kept: dict[Copy, dict[str, Tensor]] = {}
        """What a judge has found best so far."""
        self._stored_by: dict[tuple[Copy, str], tuple[str, Tensor]] = {}
        """For each store and segment the first party that released to it, and the digest of the weights it used."""
        self.at = -1
        """The turn that this worker is at."""

    def begin(self, at: int, turn: Turn, net: Net) -> None:
        """Turns to a turn; what the last one left in flight is forgotten."""
        self.at, self._turn, self._net = at, turn, net
        self._what = {name: what for what, name in turn.sums}
        edges = (*self.plan.edges(turn.flow), *self.plan.edges(turn.beside))
        self._fields = {(e.source, e.target): e.field for e in edges if e.kind == "labels" and e.field}
        """Which of several targets' labels an edge brings."""
        self._answers: dict[tuple[Copy, int, str], Tensor] = {}
        self._aims = {(e.source, e.target): e.weight for e in edges if e.kind == "features"}
        """Where a copy must give features back, and what its loss counts."""
        self._owing = {(e.source, e.target) for e in edges if e.gradient and turn.train}
        """Edges along which a gradient comes back."""
        self._out: dict[tuple[Copy, int], dict[LetterKind, Tensor]] = {}
        """What a copy has made of its rows of a micro-batch."""
        self._loss_of: dict[tuple[Copy, int], Tensor] = {}
        self._leaf: dict[tuple[str, Copy, int], Tensor] = {}
        """What a copy was given by another segment that wants a gradient for it."""
        self._counts: dict[Copy, Tensor] = {}
        self._left: dict[Copy, int] = {}
        """Of each tally: micro-batches that are still to be counted."""
        self._mail: dict[Post, dict[str, Tensor]] = {}
        self._proofs: dict[tuple[Copy, int], Tensor] = {}
        """Where parties hold columns of the same records: of which records a copy's rows are, as a keyed hash."""
        self._lacks: dict[tuple[Copy, int], Tensor] = {}
        """Of a source that has not all rows: which are here."""
        self._made: dict[tuple[LetterKind, Copy], dict[str, Tensor]] = {}
        """Bodies of letters that are not rows of `_out` or `_leaf`."""
        self._reported: dict[tuple[Copy, int], Tensor] = {}
        """The losses that have been reported."""
        self._losses_due = sum(
            task.kind == "backward" and task.what in self.segments and not work.takes and not self._decodes(task.what)
            for task, work in net.tasks.items()
        )
        self._apart = turn.scaled and all(task.what.lane for task in net.tasks if task.kind == "norm")
        self._heard: set[Copy] = set()
        """The norms of which the loss scale knows."""
        self._spoilt: set[Copy] = set()
        """The units that have made something in this turn that is not finite."""
        self._met: set[Copy] = set()
        """The units in which the gradients of tied weights have met."""
        if turn.fresh:
            self._optimizers = {key: made for key, made in self._optimizers.items() if key[0] != turn.optimizer}
            self._scales = {key: scale for key, scale in self._scales.items() if key[0] != turn.optimizer}

    def deliver(self, post: Post, tensors: dict[str, Tensor]) -> None:
        """A letter of the current turn has been taken."""
        if self._device.type != "cpu":
            tensors = {name: t.to(self._device) for name, t in tensors.items()}
        self._mail[post] = tensors

    def do(self, task: Task) -> bool:
        """One task of the current turn, all of whose needs are met. Returns whether a judge has said stop in it."""
        takes = self._net.tasks[task].takes
        if task.kind in ("forward", "backward"):
            getattr(self, f"_{task.kind}")(task.what, task.micro_batch, takes)
        elif task.kind in ("judge", "heed"):
            return self._obey(self._look(task.what) if task.kind == "judge" else self._told(takes[0]))
        elif task.kind != "ticked":
            getattr(self, f"_{task.kind}")(task.what, takes)
        return False

    def prepare(self) -> None:
        """Makes, while letters are waited for, what this turn will need whatever they say: the masks of its sums."""
        if self.sums is not None and self.at >= 0:
            for _, name in self._turn.sums:
                self.sums.prepare(self.at, name, *self._summed(name))

    def body(self, post: Post) -> dict[str, Tensor]:
        """The tensors of a letter that a finished task has made."""
        kind, source, target, m = post
        if kind in (LetterKind.ACTIVATIONS, LetterKind.LABELS, LetterKind.SCORES):
            made = self._out[source, m][kind]
            if kind is LetterKind.LABELS and (name := self._fields.get((source.segment, target.segment))):
                made = self._answers[source, m, name]
            made = self._part(made, source, target, m).detach()
            columns = self.shapes.columns(source.segment, target.segment) if kind is LetterKind.ACTIVATIONS else None
            tensors = {"x": made if columns is None else made[:, columns]}
            if kind is LetterKind.ACTIVATIONS and self.plan[target.segment].kind == "store":
                tensors["made_by"] = self._digest(source)  # so that no store mixes what two bottoms have made
            if (source, m) in self._proofs and kind is not LetterKind.SCORES:
                tensors["rows"] = self._proofs[source, m]
            return tensors
        if kind is LetterKind.GRADIENT:
            gradient = self._leaf[target.segment, source, m].grad
            if gradient is None:
                raise JobFailed(f"{source} gave no gradient to {target}")
            return {"x": self._part(gradient, source, target, m)}
        return self._made.get((kind, source), {})

    def _taken(self, post: Post) -> dict[str, Tensor]:
        """What a task uses: a letter's tensors, or what would be one if it were not made here."""
        return self._mail[post] if post in self._mail else self.body(post)

    # -- forward and backward, for each micro-batch

    def _part(self, tensor: Tensor, source: Copy, target: Copy, m: int) -> Tensor:
        """The rows of one lane in what a single copy made of all of them: they stand in the order of the sites."""
        if source.lane or not target.lane:
            return tensor
        rows, start = self._turn.rows[m], 0
        for site in self.plan.sites:
            if site == target.lane:
                break
            start += rows.get(site, 0)
        return tensor[start : start + rows[target.lane]]

    def _joined(self, posts: Sequence[Post]) -> dict[tuple[LetterKind, str], Tensor]:
        """What is taken, by kind and segment: rows of one segment's copies one after the other."""
        parts: dict[tuple[LetterKind, str], list[Tensor]] = {}
        for post in posts:
            parts.setdefault((post.kind, post.source.segment), []).append(self._taken(post)["x"])
        return {key: rows[0] if len(rows) == 1 else torch.cat(rows) for key, rows in parts.items()}

    def _forward(self, copy: Copy, m: int, takes: Sequence[Post]) -> None:
        if not takes:
            self._out[copy, m] = self._source(copy, m)
            return
        if not self.plan.sites:
            self._check_rows(copy, m, takes)
        inputs: list[Tensor] = []
        labels: Tensor | None = None
        features: tuple[Tensor, float] | None = None
        for (kind, name), rows in self._joined(takes).items():
            if kind is LetterKind.LABELS:
                labels = rows
            elif (name, copy.segment) in self._aims:
                features = rows, self._aims[name, copy.segment]
            elif (name, copy.segment) in self._owing:
                self._leaf[name, copy, m] = rows.detach().requires_grad_()
                inputs.append(self._leaf[name, copy, m])
            else:
                inputs.append(rows)
        segment = self.plan[copy.segment]
        whole = inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)
        if segment.join == "sum":
            whole = torch.stack(inputs).sum(0)
        if segment.kind == "tally":
            whole = whole.float() if whole.dtype is self._half else whole
            counted = self.tallies[copy.segment].count(self._turn, whole, labels)
            self._counts[copy] = self._counts[copy] + counted if copy in self._counts else counted
            self._left[copy] = self._left.get(copy, sum(bool(self.plan.rows(copy, r)) for r in self._turn.rows)) - 1
            if copy.segment not in self._what and not self._left[copy]:  # what is not summed with others' is final
                self.tallies[copy.segment].settle(self._turn, self._counts[copy])
        elif copy.segment in self.stores:
            self._check_makers(takes)
            self._keep(copy, m, whole, labels)
        elif segment.kind == "store":
            lanes = [site for site in self.plan.sites for _ in range(self._turn.rows[m].get(site, 0))]
            self.board += [(self._turn, lane, row) for lane, row in zip(lanes, whole, strict=True)]
        else:
            self._run(copy, m, whole, labels, features)

    def _check_rows(self, copy: Copy, m: int, takes: Sequence[Post]) -> None:
        """All that meets here is of the same records in the same order."""
        for post in takes:
            proof = self._taken(post)["rows"].cpu()
            if not torch.equal(proof, self._proofs.setdefault((copy, m), proof)):
                sender, first = (self.plan.place(p.source) for p in (post, takes[0]))
                raise OtherRecords(sender, f"sent rows of other records than {first}, or in another order")
            if (post.source, m) in self._lacks:
                self._lacks[copy, m] = self._lacks[post.source, m]

    def _keep(self, copy: Copy, m: int, rows: Tensor, labels: Tensor | None) -> None:
        """Puts what sites have released into a store, each site's by itself."""
        if labels is None:
            raise JobFailed(f"{copy} keeps rows with their labels, and no labels come")
        counts = [self._turn.rows[m].get(site, 0) for site in self.plan.sites]
        for site, x, y in zip(self.plan.sites, torch.split(rows, counts), torch.split(labels, counts), strict=True):
            if len(y):
                self.stores[copy.segment].put(self._turn.records, site, x, y)

    def _check_makers(self, takes: Sequence[Post]) -> None:
        """All that comes into a store was made by the same weights."""
        for post in takes:
            if post.kind is LetterKind.ACTIVATIONS:
                maker, made_by = self._taken(post)["made_by"].cpu(), self.plan.place(post.source)
                key = post.target, post.source.segment
                first, known = self._stored_by.setdefault(key, (made_by, maker))
                if not torch.equal(maker, known):
                    raise PeerError(made_by, f"released with another {post.source.segment} than {first}")

    def _source(self, copy: Copy, m: int) -> dict[LetterKind, Tensor]:
        if self.plan[copy.segment].kind == "tally":
            return {LetterKind.SCORES: self.reports[copy.segment]()}
        source = self.stores.get(copy.segment, self.source)
        if source is None:
            raise JobFailed("the plan puts records here, and there are none")
        offset = self._turn.offsets[m].get(copy.lane, 0)
        count = self._turn.rows[m][copy.lane]
        rows, labels = source.take(self._turn.of(m), offset, count)
        if not self.plan.sites and source is self.source:
            self._proofs[copy, m] = _bytes(source.proof(self._turn, offset, count))
            if (here := source.present(self._turn, offset, count)) is not None:
                self._lacks[copy, m] = here
        for name in {name for (source_of, _), name in self._fields.items() if source_of == copy.segment}:
            assert self.source is not None
            self._answers[copy, m, name] = self.source.answers(self._turn.of(m), offset, count, name)
        return {LetterKind.ACTIVATIONS: rows, LetterKind.LABELS: labels}

    def _decodes(self, copy: Copy) -> bool:
        return any(target == copy.segment for _, target in self._aims)

    def _run(
        self, copy: Copy, m: int, inputs: Tensor, labels: Tensor | None, features: tuple[Tensor, float] | None
    ) -> None:
        segment, training = self.segments[copy], bool(self._turn.train)
        if training and segment.draws and self._draws is not None:
            self._seed(self._draws(self.at, m, copy))
        with torch.autocast(self._device.type, self._half) if self._half else nullcontext():
            output = segment.forward(inputs, training)
        output = output.to(self.shapes.pieces[copy.segment].dtype)
        if (here := self._lacks.pop((copy, m), None)) is not None:  # a record that is not here crosses as zeros
            output = output * here.to(output).view(-1, *(1,) * (output.dim() - 1))
        if labels is None and training:
            output = self._finite(copy, output)
        self.cost.flops += len(inputs) * self.shapes.pieces[copy.segment].forward
        self._out[copy, m] = {LetterKind.ACTIVATIONS: output}
        if training and (labels is not None or features is not None):
            divisor = self._turn.divisor or sum(self.plan.rows(copy, rows) for rows in self._turn.labelled)
            output = output.to(self.shapes.dtype)
            if features is not None:
                missed = (output - features[0].flatten(1)).square().mean(1).sum()
                self._loss_of[copy, m] = features[1] * missed / divisor
            elif labels is not None:
                loss = self._own_losses.get(copy.segment, self.loss)
                self._loss_of[copy, m] = loss(output, labels) / divisor

    def _whole(self, made: Tensor, source: str, target: str, gradient: Tensor) -> Tensor:
        """The gradient of all that a segment has made, from that of what went to another one."""
        columns = self.shapes.columns(source, target)
        if columns is None:
            return gradient
        whole = torch.zeros_like(made, requires_grad=False)
        whole[:, columns] = gradient
        return whole

    def _seed(self, number: int) -> None:
        """As `torch.manual_seed`, which seeds all kinds of devices, and notes a call stack for those not in use."""
        torch.default_generator.manual_seed(number)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(number)

    def _backward(self, copy: Copy, m: int, takes: Sequence[Post]) -> None:
        if takes:
            made = self._out[copy, m][LetterKind.ACTIVATIONS]
            owed = [self._whole(made, copy.segment, name, rows) for (_, name), rows in self._joined(takes).items()]
            total = owed[0] if len(owed) == 1 else torch.stack(owed).sum(0)
            if made.requires_grad:  # a piece without weights on data has nothing to learn
                made.backward(total)  # type: ignore[no-untyped-call]
        else:
            loss = self._loss_of[copy, m]
            (loss * self._scale(copy) if self._turn.scaled else loss).backward()  # type: ignore[no-untyped-call]
            if not self._decodes(copy):
                self._reported[copy, m] = loss.detach()
            if not self._decodes(copy) and len(self._reported) == self._losses_due:
                parts = [self._reported[key] for key in sorted(self._reported)]
                self.losses.append(parts[0] if len(parts) == 1 else torch.stack(parts).sum())
        if self._turn.scaled:
            for (_, mine, micro), leaf in self._leaf.items():
                if (mine, micro) == (copy, m) and leaf.grad is not None:
                    leaf.grad = self._finite(copy, leaf.grad)
        self.cost.flops += self.plan.rows(copy, self._turn.rows[m]) * self.shapes.backward(self._turn, copy.segment)

    # -- sums and updates, for the turn

    def _summed(self, name: str) -> tuple[int, np.dtype]:
        """How many numbers of a segment are summed, and of which type."""
        if name in self.tallies:
            return self.tallies[name].size, np.dtype("float64")
        return self.shapes.pieces[name].size, np.dtype(str(self.shapes.dtype).removeprefix("torch."))

    def _share(self, copy: Copy, _: Sequence[Post]) -> None:
        what = self._what[copy.segment]
        if what == "weights":
            plain: Tensor | None = self.segments[copy].weights() * self._turn.share[copy.lane]
        else:
            plain = self._counts.get(copy) if what == "tally" else self.segments[copy].gradient()
        if plain is None:  # no records in this turn: zeros, for the masks must cancel
            numbers = np.zeros(*self._summed(copy.segment))
        else:
            if what == "gradient" and self._turn.scaled:
                plain = plain / self._scale(copy)
                self._finite(copy, plain)
            numbers = plain.detach().cpu().numpy()
        if self._unit(copy) in self._spoilt and not np.isfinite(numbers).all():
            masked = self._side(copy.segment).spoil(self.at, copy.segment, *self._summed(copy.segment))
        else:
            masked = self._side(copy.segment).mask(self.at, copy.segment, numbers)
        self._made[LetterKind.SHARE, copy] = {"x": _signed(masked)}

    def _add(self, what: Copy, takes: Sequence[Post]) -> None:
        self._made[LetterKind.SUM, what] = {"x": _signed(add([_unsigned(self._taken(post)["x"]) for post in takes]))}

    def _load(self, copy: Copy, takes: Sequence[Post]) -> None:
        total = _unsigned(self._taken(takes[0])["x"])
        _, dtype = self._summed(copy.segment)
        plain = torch.from_numpy(self._side(copy.segment).unmask(self.at, copy.segment, total, dtype))
        what = self._what[copy.segment]
        if what == "tally":
            self.tallies[copy.segment].settle(self._turn, plain)
        elif what == "weights":
            self.segments[copy].load(plain.to(self._device))
        else:
            self.segments[copy].set_gradient(plain.to(self._device))

    def _side(self, segment: str) -> Sums:
        if self.plan[segment].at == self.plan.hub:  # all copies are here: there is nobody to hide them from
            return ClearSum()
        if self.sums is None:
            raise JobFailed("a sum is due, and no keys were agreed")
        return self.sums

    # -- the norm of all gradients, and whether they are finite: a negative number says that they are not

    def _meet(self, unit: Copy) -> None:
        """Once a turn, before anything is made of the gradients."""
        if unit not in self._met:
            self._met.add(unit)
            meet(self._tied, self.segments, self._trained(unit))

    def _trained(self, unit: Copy) -> list[Copy]:
        return [c for c in self.segments if c.lane == unit.lane and c.segment in self._turn.train]

    def _square(self, unit: Copy, _: Sequence[Post]) -> None:
        self._meet(unit)
        square, mine = 0.0, squared(self.plan, self._turn, unit)
        for copy in mine:
            gradient = self.segments[copy].gradient()
            if gradient is not None:
                if self._what.get(copy.segment) != "gradient" and self._turn.scaled:
                    gradient.div_(self._scale(copy))  # a share was divided before it was summed
                square += float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
        square -= counted_twice(self._tied, self.segments, mine)
        if unit in self._spoilt or not math.isfinite(square):
            if not self._turn.scaled:
                raise JobFailed("a gradient holds NaN or infinite numbers; lower the learning rate")
            square = -1.0
        self._made[LetterKind.SQUARE, unit] = {"x": torch.tensor([square], dtype=torch.float64)}

    def _norm(self, what: Copy, takes: Sequence[Post]) -> None:
        squares = [self._number(post) for post in takes]
        norm = math.sqrt(sum(squares)) if min(squares) >= 0 else -1.0
        self._made[LetterKind.NORM, what] = {"x": torch.tensor([norm], dtype=torch.float64)}

    def _rescale(self, unit: Copy, takes: Sequence[Post]) -> float:
        """What gradients are multiplied by, after Pascanu et al. 2013, algorithm 1; negative for a step to skip."""
        norm = self._number(takes[0])
        if self._turn.scaled and takes[0].source not in self._heard:
            self._heard.add(takes[0].source)  # a party may have several units
            self._scale_of(takes[0].source.lane).hear(norm >= 0)
        return min(1.0, self._turn.clip / (norm + 1e-6)) if norm >= 0 else -1.0

    def _number(self, post: Post) -> float:
        number = float(self._taken(post)["x"])
        if number < 0 and not self._turn.scaled:
            raise PeerError(post.source.segment, f"told {post} as a negative number")
        return number

    def _scale(self, copy: Copy) -> float:
        """The loss scale, at which a copy's gradients are now."""
        return self._scale_of(copy.lane if self._apart else ONE).value

    def _scale_of(self, lane: str) -> LossScale:
        return self._scales.setdefault((self._turn.optimizer, lane), LossScale())

    def _finite(self, copy: Copy, tensor: Tensor) -> Tensor:
        """Zeros in place of what is not finite, if its unit's square will tell so; else the door refuses it."""
        unit = self._unit(copy)
        if not self._turn.scaled or Task("square", unit) not in self._net.tasks or bool(tensor.isfinite().all()):
            return tensor
        self._spoilt.add(unit)
        return torch.zeros_like(tensor)

    def _unit(self, copy: Copy) -> Copy:
        return Copy(self.plan.place(copy), copy.lane)

    def _update(self, unit: Copy, takes: Sequence[Post]) -> None:
        coefficient = self._rescale(unit, takes) if takes else 1.0
        self._meet(unit)
        mine = self._trained(unit)
        key = (self._turn.optimizer, unit, tuple(c.segment for c in mine))
        flats = [flat for c in mine if (flat := self.segments[c].flat) is not None]
        if flats and coefficient >= 0:
            if key not in self._optimizers:
                self._optimizers[key] = made = self._makers[self._turn.optimizer](flats[:1])
                for flat in flats[1:]:  # a group each: fused SGD does not take some with momentum and some without
                    made.add_param_group({"params": [flat]})
            for copy in mine:
                flat = self.segments[copy].flat
                if flat is not None and copy in self._handed:
                    self._optimizers[key].state[flat] = self._handed.pop(copy)
            for group in self._optimizers[key].param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * self._turn.rate
            for flat in flats:
                if flat.grad is not None and coefficient < 1:
                    flat.grad.mul_(coefficient)
            self._optimizers[key].step()
        for copy in mine:
            self.segments[copy].clear()

    # -- what moves

    def _give(self, copy: Copy, _: Sequence[Post]) -> None:
        if copy in self._lockers:
            self._made[LetterKind.STATE, copy] = self._lockers.pop(copy)
            return
        self._made[LetterKind.STATE, copy] = self.segments[copy].tensors()
        if self._turn.state:
            self._made[LetterKind.STATE, copy] |= {f"{STATE}{n}": t for n, t in self._state_of(copy).items()}

    def _take(self, copy: Copy, takes: Sequence[Post]) -> None:
        taken = self._taken(takes[0])
        if self.plan[copy.segment].kind == "locker":
            self._lockers[copy] = taken
            return
        self.segments[copy].load_tensors({name: t for name, t in taken.items() if not name.startswith(STATE)})
        if self._turn.state:
            self._handed[copy] = {n.removeprefix(STATE): t for n, t in taken.items() if n.startswith(STATE)}

    def _state_of(self, copy: Copy) -> dict[str, Tensor]:
        """What the optimiser keeps for a copy's numbers. Zeros before its first step, which trains the same."""
        flat, names = self.segments[copy].flat, self.shapes.optimizer_state
        kept = self._handed.get(copy, {})
        for (kind, _, _), optimizer in self._optimizers.items():
            if kind == self._turn.optimizer and flat is not None and copy not in self._handed:
                kept = optimizer.state.get(flat, kept)
        numbers = torch.zeros(self.segments[copy].size, dtype=self.shapes.dtype, device=self._device)
        nothing = {name: torch.zeros((), dtype=torch.float32) if name == "step" else numbers for name in names}
        return {name: kept.get(name, nothing[name]).clone() for name in names}

    def _choose(self, site: Copy, _: Sequence[Post]) -> None:
        choice = self._turn.choice
        assert choice is not None
        self.stays = self._better is not None and self._better(choice.better, choice.than)
        for name, other in () if self.stays else choice.of:
            taken = self.segments[Copy(other, site.segment)].tensors()
            self.segments[Copy(name, site.segment)].load_tensors(taken)

    def _digest(self, copy: Copy) -> Tensor:
        """SHA-256 of a copy's weights, or a keyed hash of all records of a source, shape (32,), uint8."""
        if self.plan[copy.segment].kind == "records":
            assert self.source is not None
            return _bytes(self.source.all_proof())
        weights = self.segments[copy].weights().cpu().numpy().tobytes()
        return _bytes(hashlib.sha256(weights).digest())

    def _attest(self, copy: Copy, _: Sequence[Post]) -> None:
        self._made[LetterKind.EQUAL, copy] = {"x": self._digest(copy)}

    def _compare(self, copy: Copy, takes: Sequence[Post]) -> None:
        mine = self._made[LetterKind.EQUAL, copy]["x"]
        if self.plan[copy.segment].kind == "records":
            others = [self.plan.place(p.source) for p in takes if not torch.equal(self._taken(p)["x"].cpu(), mine)]
            if others:
                too = f", and so have {', '.join(others[1:])}" if others[1:] else ""
                words = f"has another list of records than {self.plan.place(copy)}{too}: match them anew"
                raise OtherRecords(others[0], words)
            return
        for post in takes:
            if not torch.equal(self._taken(post)["x"].cpu(), mine):
                words = f"holds another {copy.segment} than {self.plan.place(copy)}: the sites' copies have come apart"
                raise PeerError(self.plan.place(post.source), words)

    # -- which weights are kept

    def _look(self, judge: Copy) -> Verdict:
        assert self._turn.judge is not None
        verdict = self._judges[self._turn.judge.tally]()
        self._made[LetterKind.VERDICT, judge] = {"x": _bytes(bytes([verdict]))}
        return verdict

    def _told(self, post: Post) -> Verdict:
        return Verdict(int(self._taken(post)["x"]) & 3)

    def _obey(self, verdict: Verdict) -> bool:
        judge = self._turn.judge
        assert judge is not None
        mine = [copy for copy in self.segments if copy.segment in judge.keeps]
        if Verdict.KEEP in verdict:
            self._kept = {copy: self.segments[copy].tensors() for copy in mine}
        if Verdict.STOP in verdict or judge.last:
            for copy, tensors in self._kept.items():
                self.segments[copy].load_tensors(tensors)
        return Verdict.STOP in verdict

    def _account(self, party: Copy, _: Sequence[Post]) -> None:
        head = self._account_head() if self._account_head else bytes(32)
        self._made[LetterKind.ACCOUNT, party] = {"x": _bytes(head)}

    def _note(self, party: Copy, takes: Sequence[Post]) -> None:
        self.accounts[party.segment] = self._taken(takes[0])["x"].cpu().numpy().tobytes()


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _signed(words: Words | Numbers) -> Tensor:
    """Words as torch and the wire have them: int64 for uint64."""
    return torch.from_numpy(words.view(np.int64) if words.dtype == np.uint64 else words)


def _unsigned(tensor: Tensor) -> Any:
    array = tensor.cpu().numpy()
    return array.view(np.uint64) if array.dtype == np.int64 else array
