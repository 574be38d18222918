"""Does with torch what a step asks: forward, backward, share, add, load, update, give and take.

It looks at the plan for shapes and neighbours, never for who it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from partway.cost import Cost
from partway.errors import JobFailed, PeerError
from partway.model.segment import Segment
from partway.plan.plan import Copy, Edge, Plan, Rows, Turn
from partway.privacy.blind_sum import Numbers, Words, add
from partway.protocol.messages import LetterKind, Post
from partway.protocol.net import EDGE_LETTERS, Net, Task
from partway.shapes import Shapes
from partway.train.baselines import OptimizerOf

Loss = Callable[[Tensor, Tensor], Tensor]
"""A sum over records, of outputs (n, ...) and labels (n,)."""


class Sums(Protocol):
    """This party's half of a sum over sites: `privacy.blind_sum` has both."""

    def mask(self, turn: int, segment: str, share: Numbers) -> Words | Numbers: ...

    def unmask(self, turn: int, segment: str, total: Any, dtype: np.dtype) -> Numbers: ...


class Source(Protocol):
    """A site's records."""

    def take(self, turn: Turn, offset: int, rows: int) -> tuple[Tensor, Tensor]:
        """Features and labels of this site's rows of a turn."""


class Tally(Protocol):
    """Counts over a site's records that are summed over sites, in float64."""

    size: int

    def count(self, turn: Turn, inputs: Tensor, labels: Tensor | None) -> Tensor:
        """Shape (size,)."""

    def settle(self, turn: Turn, total: Tensor) -> None:
        """The sum over all sites has come."""


class Worker:
    """One party's segments, optimisers and tensors in flight.

    Args:
        segments: the copies that live at this party.
        optimizer: makes the optimiser of a unit, a party's copies of one lane, from their flat parameters.
        source: its records, if it has any.
        tallies: what each tally counts here.
        reports: figures that a tally tells, shape (1, n), float64.
        account: the head of this party's ledger, 32 bytes.
        loss: a sum over records; the turn's divisor makes it a mean.
        draws: seeds what a segment draws in a forward, from turn, micro-batch and copy.
    """

    def __init__(
        self,
        plan: Plan,
        shapes: Shapes,
        segments: Mapping[Copy, Segment],
        *,
        optimizer: OptimizerOf,
        source: Source | None = None,
        tallies: Mapping[str, Tally] | None = None,
        reports: Mapping[str, Callable[[], Tensor]] | None = None,
        account: Callable[[], bytes] | None = None,
        loss: Loss | None = None,
        draws: Callable[[int, int, Copy], int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.plan, self.shapes, self.segments, self.source = plan, shapes, dict(segments), source
        self.tallies, self.reports = dict(tallies or {}), dict(reports or {})
        self.sums: Sums | None = None
        """Blind or clear; set once keys are agreed, None at a party without shared copies."""
        self.cost = Cost()
        self.losses: list[Tensor] = []
        """The loss of each step so far, at a party that has the labels."""
        self.board: list[tuple[Turn, str, Tensor]] = []
        """Figures that sites have told: the turn, the site, shape (n,)."""
        self.accounts: dict[str, bytes] = {}
        """Heads of the other parties' ledgers, at the hub."""
        self._optimizer, self._account_head, self._draws = optimizer, account, draws
        self._device = torch.device(device)
        self._loss = loss or (lambda x, y: nn.functional.cross_entropy(x, y, reduction="sum"))
        self._optimizers: dict[tuple[Copy, tuple[str, ...]], torch.optim.Optimizer] = {}
        self._at = -1

    def begin(self, at: int, turn: Turn, net: Net) -> None:
        """Turns to a turn; what the last one left in flight is forgotten."""
        if at == self._at:
            return
        self._at, self._turn, self._net = at, turn, net
        self._into: dict[str, list[Edge]] = {}
        for edge in self.plan.edges(turn.flow):
            self._into.setdefault(edge.target, []).append(edge)
        self._what = {name: what for what, name in turn.sums}
        self._out: dict[tuple[Copy, int], dict[str, Tensor]] = {}
        """What a copy has made of its rows of a micro-batch: activations, labels, scores, loss."""
        self._leaf: dict[tuple[Edge, Copy, int], Tensor] = {}
        """What a copy was given along an edge that owes a gradient."""
        self._mail: dict[Post, dict[str, Tensor]] = {}
        self._made: dict[LetterKind, dict[Copy, dict[str, Tensor]]] = {kind: {} for kind in LetterKind}
        """Bodies of letters that are not rows of `_out` or `_leaf`."""

    def deliver(self, post: Post, tensors: dict[str, Tensor]) -> None:
        """A letter of the current turn has been taken."""
        if self._device.type != "cpu":
            tensors = {name: t.to(self._device) for name, t in tensors.items()}
        self._mail[post] = tensors

    def do(self, task: Task) -> None:
        """One task of the current turn, all of whose needs are met."""
        kind, what, m = task
        if kind == "forward":
            self._forward(what, m)
        elif kind == "backward":
            self._backward(what, m)
        elif kind != "ticked":
            getattr(self, f"_{kind}")(what)

    def body(self, post: Post) -> dict[str, Tensor]:
        """The tensors of a letter that a finished task has made."""
        kind, source, m = post.kind, post.source, post.micro_batch
        if kind in (LetterKind.ACTIVATIONS, LetterKind.LABELS, LetterKind.SCORES):
            return {"x": self._part(self._out[source, m][kind.name.lower()], source, post.target, m).detach()}
        if kind is LetterKind.GRADIENT:
            return {"x": self._gradient(post.target, source, m)}
        return self._made[kind].get(source, {})

    # -- forward and backward, for each micro-batch

    def _rows(self, m: int) -> Rows:
        return self._turn.rows[m]

    def _part(self, tensor: Tensor, source: Copy, target: Copy, m: int) -> Tensor:
        """The rows of one lane in what a single copy made of all of them: they stand in the order of the sites."""
        if source.lane or not target.lane:
            return tensor
        rows, start = self._rows(m), 0
        for site in self.plan.sites:
            if site == target.lane:
                break
            start += rows.get(site, 0)
        return tensor[start : start + rows[target.lane]]

    def _received(self, edge: Edge, source: Copy, target: Copy, m: int) -> Tensor:
        letter = self._mail.get(Post(EDGE_LETTERS[edge.kind], source, target, m))
        return self._part(self._out[source, m][edge.kind], source, target, m) if letter is None else letter["x"]

    def _forward(self, copy: Copy, m: int) -> None:
        edges = self._into.get(copy.segment)
        if not edges:
            self._out[copy, m] = self._source(copy, m)
            return
        inputs: list[Tensor] = []
        labels: Tensor | None = None
        for edge in edges:
            parts = [
                self._received(edge, source, copy, m) for source in self.plan.meets(copy, edge.source, self._rows(m))
            ]
            joined = (parts[0] if len(parts) == 1 else torch.cat(parts)).detach()
            if edge.kind == "labels":
                labels = joined
                continue
            if edge.gradient and self._turn.train:
                self._leaf[edge, copy, m] = joined.requires_grad_()
            inputs.append(joined)
        segment = self.plan[copy.segment]
        whole = inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)
        if segment.join == "sum":
            whole = torch.stack(inputs).sum(0)
        if segment.kind == "tally":
            counted = self.tallies[copy.segment].count(self._turn, whole, labels)
            self._out[copy, m] = {"count": counted}
        elif segment.kind == "store":
            lanes = [site for site in self.plan.sites for _ in range(self._rows(m).get(site, 0))]
            self.board += [(self._turn, lane, row) for lane, row in zip(lanes, whole, strict=True)]
        else:
            self._run(copy, m, whole, labels)

    def _source(self, copy: Copy, m: int) -> dict[str, Tensor]:
        if self.plan[copy.segment].kind == "tally":
            return {"scores": self.reports[copy.segment]()}
        if self.source is None:
            raise JobFailed("the plan puts records here, and there are none")
        offset = self._turn.offsets[m].get(copy.lane, 0)
        features, labels = self.source.take(self._turn, offset, self._rows(m)[copy.lane])
        return {"activations": features, "labels": labels}

    def _run(self, copy: Copy, m: int, inputs: Tensor, labels: Tensor | None) -> None:
        segment, training = self.segments[copy], bool(self._turn.train)
        if training and segment.draws and self._draws is not None:
            torch.manual_seed(self._draws(self._at, m, copy))
        output = segment.forward(inputs, training)
        self.cost.flops += len(inputs) * self.shapes.pieces[copy.segment].forward
        out = self._out[copy, m] = {"activations": output}
        if labels is not None and training:
            out["loss"] = self._loss(output, labels) / self._turn.divisor

    def _backward(self, copy: Copy, m: int) -> None:
        out = self._out[copy, m]
        if "loss" in out:
            out["loss"].backward()  # type: ignore[no-untyped-call]
            self.losses.append(out["loss"].detach())
        else:
            out["activations"].backward(self._owed(copy, m))  # type: ignore[no-untyped-call]
        records = self.plan.rows(copy, self._rows(m))
        self.cost.flops += records * self.shapes.pieces[copy.segment].backward

    def _owed(self, copy: Copy, m: int) -> Tensor:
        """The gradient of all that a copy handed on: rows of its successors' copies joined, successors added."""
        total: Tensor | None = None
        for edge in self.plan.edges(self._turn.flow):
            if edge.source == copy.segment and edge.gradient:
                targets = self.plan.meets(copy, edge.target, self._rows(m))
                parts = [
                    self._gradient(copy, target, m)
                    for target in targets
                    if Task("backward", target, m) in self._net.tasks
                ]
                if parts:
                    part = parts[0] if len(parts) == 1 else torch.cat(parts)
                    total = part if total is None else total + part
        if total is None:
            raise JobFailed(f"nothing gives {copy} a gradient")
        return total

    def _gradient(self, copy: Copy, target: Copy, m: int) -> Tensor:
        """What `target` gives back for the rows that it had of `copy`."""
        letter = self._mail.get(Post(LetterKind.GRADIENT, target, copy, m))
        if letter is not None:
            return letter["x"]
        edge = next(e for e in self._into[target.segment] if e.source == copy.segment and e.gradient)
        gradient = self._leaf[edge, target, m].grad
        if gradient is None:
            raise JobFailed(f"{target} gave no gradient to {copy}")
        return self._part(gradient, target, copy, m)

    # -- sums and updates, for the turn

    def _share(self, copy: Copy) -> None:
        plain: Tensor | None
        if self._what[copy.segment] == "tally":
            size, dtype = self.tallies[copy.segment].size, torch.float64
            counted = [out["count"] for (other, _), out in self._out.items() if other == copy]
            plain = torch.stack(counted).sum(0) if counted else None
        else:
            size, dtype = self.segments[copy].size, self.shapes.dtype
            plain = self.segments[copy].gradient()
        if plain is None:  # no records in this turn: zeros, for the masks must cancel
            plain = torch.zeros(size, dtype=dtype)
        masked = self._half().mask(self._at, copy.segment, plain.detach().cpu().numpy())
        self._made[LetterKind.SHARE][copy] = {"x": _signed(masked)}

    def _add(self, what: Copy) -> None:
        posts = [Post(LetterKind.SHARE, copy, what) for copy in self.plan.copies(what.segment)]
        shares = [_unsigned(self._mail[post]["x"]) for post in posts]
        self._made[LetterKind.SUM][what] = {"x": _signed(add(shares))}

    def _load(self, copy: Copy) -> None:
        total = _unsigned(self._mail[Post(LetterKind.SUM, Copy(copy.segment), copy)]["x"])
        tally = self._what[copy.segment] == "tally"
        dtype = torch.float64 if tally else self.shapes.dtype
        plain = torch.from_numpy(self._half().unmask(self._at, copy.segment, total, _numpy(dtype)))
        if tally:
            self.tallies[copy.segment].settle(self._turn, plain)
        else:
            self.segments[copy].set_gradient(plain.to(self._device))

    def _half(self) -> Sums:
        if self.sums is None:
            raise JobFailed("a sum is due, and no keys were agreed")
        return self.sums

    def _update(self, unit: Copy) -> None:
        mine = [c for c in self.segments if c.lane == unit.lane and c.segment in self._turn.train]
        key = (unit, tuple(c.segment for c in mine))
        if key not in self._optimizers:
            flats = [flat for c in mine if (flat := self.segments[c].flat) is not None]
            self._optimizers[key] = self._optimizer(flats)
        self._optimizers[key].step()
        for copy in mine:
            self.segments[copy].clear()

    # -- what moves

    def _give(self, copy: Copy) -> None:
        self._made[LetterKind.STATE][copy] = self.segments[copy].tensors()

    def _take(self, copy: Copy) -> None:
        source = next(a for a, b in self._turn.gives if b == copy)
        letter = self._mail.get(Post(LetterKind.STATE, source, copy))
        self.segments[copy].load_tensors(self._made[LetterKind.STATE][source] if letter is None else letter)

    def _attest(self, copy: Copy) -> None:
        weights = self.segments[copy].weights().cpu().numpy().tobytes()
        self._made[LetterKind.EQUAL][copy] = {"x": _bytes(hashlib.sha256(weights).digest())}

    def _compare(self, copy: Copy) -> None:
        mine = self._made[LetterKind.EQUAL][copy]["x"]
        for other in self.plan.copies(copy.segment):
            letter = self._mail.get(Post(LetterKind.EQUAL, other, copy))
            if letter is not None and not torch.equal(letter["x"].cpu(), mine):
                words = f"holds another {copy.segment} than {self.plan.place(copy)}: the sites' copies have come apart"
                raise PeerError(self.plan.place(other), words)

    def _account(self, party: Copy) -> None:
        head = self._account_head() if self._account_head else bytes(32)
        self._made[LetterKind.ACCOUNT][party] = {"x": _bytes(head)}

    def _note(self, party: Copy) -> None:
        letter = self._mail[Post(LetterKind.ACCOUNT, party, Copy(self.plan.hub))]
        self.accounts[party.segment] = letter["x"].cpu().numpy().tobytes()


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _signed(words: Words | Numbers) -> Tensor:
    """Words as torch and the wire have them: int64 for uint64."""
    return torch.from_numpy(words.view(np.int64) if words.dtype == np.uint64 else words)


def _unsigned(tensor: Tensor) -> Any:
    array = tensor.cpu().numpy()
    return array.view(np.uint64) if array.dtype == np.int64 else array


def _numpy(dtype: torch.dtype) -> np.dtype:
    return np.dtype(str(dtype).removeprefix("torch."))
