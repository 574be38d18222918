"""Plain loops to compare with: pooled records in one place, and each site alone. Nothing of the protocol runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from partway.plan.plan import Turn

OptimizerOf = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def train(network: nn.Module, optimizer: OptimizerOf, batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """The loop that every reader knows: zero the gradients, mean loss over the batch, backward, step.

    Args:
        network: trained in place.
        batches: features (n, ...) and labels (n,) of one step after another.

    Returns:
        The loss of each step.
    """
    made, losses = optimizer(list(network.parameters())), []
    network.train()
    for features, labels in batches:
        made.zero_grad()
        loss = nn.functional.cross_entropy(network(features), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        made.step()
        losses.append(loss.detach())
    network.eval()
    return [float(loss) for loss in losses]


def shuffled_batches(
    features: Tensor, labels: Tensor, batch: int, epochs: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """All records in each epoch, reshuffled, in batches as equal as can be and no larger than `batch`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for index in order.tensor_split(-(-len(labels) // batch)):
            yield features[index], labels[index]


def union_batches(
    turns: Sequence[Turn], sites: Sequence[str], take: Mapping[str, Callable[[Turn, int, int], tuple[Tensor, Tensor]]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The very records of a split run, in its order, as one batch: what pooling would have trained on.

    Args:
        turns: of the split run; only its training steps are used.
        take: by site, (turn, offset, rows) -> features and labels.
    """
    for turn in turns:
        if turn.train:
            rows, offsets = turn.rows[0], turn.offsets[0]
            parts = [take[site](turn, offsets[site], rows[site]) for site in sites if rows.get(site)]
            yield torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
