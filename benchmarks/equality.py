"""Networks of others, cut into two and into three, train as in one piece: 20 steps, two optimisers, two batch sizes.

Loss, all parameters, all buffers, the optimisers' states, and in evaluation the output: the largest difference of each.
An optimiser a party; values and gradients cross as copies.

    python benchmarks/equality.py [--quick]        needs the extra `networks`
"""

from __future__ import annotations

import copy
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from networks import CASES, ROWS, Case
from reporting import Claim, report
from rich.progress import Progress
from torch import Tensor

from partway.model.capture import call_of
from partway.model.check import tensors_of, walk
from partway.model.cut import cut

MAKERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
}
FIGURES = ("loss", "parameters", "buffers", "optimiser", "evaluation")


def far(one: Tensor, other: Tensor) -> float:
    """The largest difference; infinite where something is no number, so that a run that has diverged equals nothing."""
    found = (one.detach().double() - other.detach().double()).abs().max().item() if one.numel() else 0.0
    return found if math.isfinite(found) else math.inf


def loss_of(outputs: list[Tensor]) -> Tensor:
    """Something of all that comes out, of which gradients are of a usual size."""
    return torch.stack([output.float().square().mean() for output in outputs if output.is_floating_point()]).sum()


def one(name: str, places: int, optimizer: str, steps: int) -> dict[str, float]:
    """The largest differences of one run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case: Case = CASES[name]
    network = case.make()
    whole = copy.deepcopy(network)
    after = case.cuts[places - 2]
    together = [[0, places - 1]] if case.around else []
    pieces = cut(network, case.args, after, together, case.may_cross, case.kwargs)
    groups = [[0, places - 1], *([n] for n in range(1, places - 1))] if case.around else [[n] for n in range(places)]
    owned = [{id(p): (k, p) for n in group for k, p in pieces[n].named_parameters()} for group in groups]
    mine = MAKERS[optimizer](list(whole.parameters()))
    parties = [MAKERS[optimizer]([p for _, p in own.values()]) for own in owned if own]
    worst = dict.fromkeys(FIGURES, 0.0)
    call = call_of(case.args, case.kwargs)
    made_names = {output for piece in pieces for output in piece.outputs}
    raw = names_of(pieces, made_names, call)
    for step in range(steps):
        rows = ROWS if step % 2 else ROWS - 2
        batch = call.with_rows(rows)
        for each in (mine, *parties):
            each.zero_grad()
        torch.manual_seed(step)
        outputs = tensors_of(whole.train()(*batch.args, **batch.kwargs))
        loss = loss_of(outputs)
        gradients = torch.autograd.grad(loss, outputs, retain_graph=True)
        loss.backward()
        for piece in pieces:
            piece.train()
        torch.manual_seed(step)
        found = walk(pieces, dict(zip(raw, batch.tensors, strict=True)), rows, True, weights=list(gradients))
        worst["loss"] = max(worst["loss"], far(loss, loss_of(found)))
        for each in (mine, *parties):
            each.step()
    state = whole.state_dict()
    parameters = dict(whole.named_parameters())
    for piece in pieces:
        for key, tensor in piece.state_dict().items():
            kind = "parameters" if key in parameters else "buffers"
            worst[kind] = max(worst[kind], far(state[key], tensor))
    for party in parties:
        known = {id(p): key for piece in pieces for key, p in piece.named_parameters()}
        for p, own in party.state.items():
            for key, value in own.items():
                other: Any = mine.state[parameters[known[id(p)]]][key]
                worst["optimiser"] = max(worst["optimiser"], far(torch.as_tensor(other), torch.as_tensor(value)))
    for module in (whole, *pieces):
        module.eval()
    with torch.no_grad():
        expected = tensors_of(whole(*call.args, **call.kwargs))
    found = walk(pieces, dict(zip(raw, call.tensors, strict=True)), ROWS, False)
    worst["evaluation"] = max(far(a, b) for a, b in zip(expected, found, strict=True))
    return worst


def names_of(pieces: Any, made: set[str], call: Any) -> list[str]:
    """What the pieces call the network's tensors, in the order of the call."""
    raw = list(dict.fromkeys(name for piece in pieces for name in piece.inputs if name not in made))
    if len(raw) != len(call.tensors):
        raise SystemExit(f"the pieces take {raw}, and the call has {len(call.tensors)} tensors")
    return sorted(raw, key=list(call.kwargs).index) if call.kwargs else raw


def main(quick: bool) -> None:
    names = ["resnet18", "gpt2, tied", "table"] if quick else list(CASES)
    steps = 5 if quick else 20
    print(f"about {'1 minute' if quick else '6 minutes'} on two cores")
    found: dict[tuple[str, int, str], dict[str, float]] = {}
    runs = [(name, places, kind) for name in names for places in (2, 3) for kind in MAKERS]
    with ProcessPoolExecutor(2) as pool, Progress() as progress:
        waiting = {pool.submit(one, *run, steps): run for run in runs}
        task = progress.add_task("runs", total=len(runs))
        for done in as_completed(waiting):
            found[waiting[done]] = done.result()
            progress.advance(task)
    worst = max(value for figures in found.values() for value in figures.values())
    exact = sum(all(max(found[n, p, k].values()) == 0 for p in (2, 3) for k in MAKERS) for n in names)
    least = min(12, len(names))
    claims = [
        Claim("equality_worst", worst, "largest difference", "at most 1e-6", worst <= 1e-6),
        Claim(
            "equality_networks",
            exact,
            f"of {len(names)} networks equal in every bit",
            f"at least {least}",
            exact >= least,
        ),
    ]
    lines = [
        f"{steps} steps, batches of {ROWS - 2} and {ROWS} in turn, float32, random weights, one seed; largest",
        "difference from the network in one piece.",
        "",
        "| network | pieces | optimiser | " + " | ".join(FIGURES) + " |",
        "| --- " * (3 + len(FIGURES)) + "|",
    ]
    for name, places, kind in runs:
        figures = " | ".join(f"{found[name, places, kind][figure]:.2g}" for figure in FIGURES)
        lines.append(f"| {name} | {places}: after {', '.join(CASES[name].cuts[places - 2])} | {kind} | {figures} |")
    report("equality", claims, lines, len(os.sched_getaffinity(0)), quick)


if __name__ == "__main__":
    main("--quick" in sys.argv)
