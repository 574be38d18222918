"""What a worker takes its rows from, in a secret order: a site's own records, or what sites have released to it."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import torch
from torch import Tensor

from partway.data.records import Records
from partway.plan.plan import Part, Turn
from partway.train.draws import order_of


class RecordSource:
    """One site's records in one job.

    Args:
        secret: this site's; together with the job it decides which record stands where.
        job: digest of the signed job.
    """

    def __init__(
        self, records: Records, secret: bytes, job: bytes, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.records, self._secret, self._job, self._dtype, self._device = records, secret, job, dtype, device
        self.labels = records.labels.to(device)
        self.features = records.features.to(device)
        """As read, float64, until `standardise` is called."""
        self.scaling: tuple[Tensor, Tensor] | None = None
        """Mean and deviation of each numeric column, once all sites have agreed on them."""
        self._orders: dict[Part, tuple[int, Tensor]] = {}
        """Of each part: the epoch, and its order."""
        self._shared = b""
        if not records.schema.numeric:
            self.features = self.features.to(dtype)

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Numeric columns in units of what all sites have agreed on, in the job's dtype from now on."""
        self.scaling = mean, deviation
        self.features = self.records.scaled(mean, deviation).to(self._device, self._dtype)

    def take(self, turn: Turn, offset: int, rows: int) -> tuple[Tensor, Tensor]:
        """Features and labels of this site's rows of a turn.

        Args:
            offset: where the rows begin in this site's order of that part and epoch.
        """
        chosen = self.chosen(turn, offset, rows)
        return self.features.index_select(0, chosen), self.labels.index_select(0, chosen)

    def chosen(self, turn: Turn, offset: int, rows: int) -> Tensor:
        """Which records they are, shape (rows,), int64."""
        epoch, order = self._orders.get(turn.records, (-1, torch.empty(0)))
        if epoch != turn.epoch:
            index = self.records.division[turn.records]
            order = index[order_of(len(index), self._secret, self._job, turn.epoch)].to(self._device)
            self._orders[turn.records] = turn.epoch, order
        return order[offset : offset + rows]

    def answers(self, turn: Turn, offset: int, rows: int, target: str) -> Tensor:
        """The labels of one of several targets, of the same rows."""
        return self.records.targets[target].to(self._device).index_select(0, self.chosen(turn, offset, rows))

    # -- where other parties hold columns of the same records

    def share(self, secret: bytes) -> None:
        """All take them in one order, drawn from this secret."""
        self._secret = self._shared = secret

    def proof(self, turn: Turn, offset: int, rows: int) -> bytes:
        """HMAC-SHA256 of the records' ids, in the order of the rows."""
        return self._hash(self.chosen(turn, offset, rows).cpu())

    def all_proof(self) -> bytes:
        """The same of all records."""
        return self._hash(torch.arange(len(self.labels)))

    def present(self, turn: Turn, offset: int, rows: int) -> Tensor | None:
        """Which of the rows are here, shape (rows,), bool; None: all."""
        if self.records.present is None:
            return None
        return self.records.present[self.chosen(turn, offset, rows).cpu()].to(self._device)

    def _hash(self, chosen: Tensor) -> bytes:
        ids = [self.records.ids[n] for n in chosen.tolist()] if self.records.ids else map(str, chosen.tolist())
        return hmac.digest(self._shared, b"partway/rows/v1\0" + "\0".join(ids).encode(), "sha256")


class Shelf:
    """What sites have released to this party: rows and labels, in the order of the sites.

    Args:
        secret: this party's; together with the job it decides in which order rows are taken.
        job: digest of the signed job.
    """

    def __init__(self, sites: Sequence[str], secret: bytes, job: bytes) -> None:
        self._sites, self._secret, self._job = sites, secret, job
        self._released: dict[Part, dict[str, list[tuple[Tensor, Tensor]]]] = {}
        self._whole: dict[Part, tuple[Tensor, Tensor]] = {}
        """What was released of a part, once it is taken from."""
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def put(self, part: Part, site: str, rows: Tensor, labels: Tensor) -> None:
        """A site's rows, shape (n, ...), and labels, shape (n,), after those that it has released before."""
        self._released.setdefault(part, {}).setdefault(site, []).append((rows, labels))

    def take(self, turn: Turn, offset: int, rows: int) -> tuple[Tensor, Tensor]:
        """Rows and labels of a turn: in this party's order of the epoch where segments train, else as they stand."""
        if turn.records not in self._whole:
            held = self._released.pop(turn.records)
            parts = [part for site in self._sites for part in held.get(site, [])]
            self._whole[turn.records] = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
        x, y = self._whole[turn.records]
        if not turn.train:
            return x[offset : offset + rows], y[offset : offset + rows]
        if turn.epoch != self._epoch:
            self._epoch, self._order = turn.epoch, order_of(len(y), self._secret, self._job, turn.epoch).to(y.device)
        chosen = self._order[offset : offset + rows]
        return x.index_select(0, chosen), y.index_select(0, chosen)
