"""What it costs to run a network as a program: CPU time against the same network run by PyTorch, forward and backward.

resnet18 and vit_tiny at 3 x 224 x 224, 4 images, one thread, in training, in pairs that take turns; the whole network
as one piece.

    python benchmarks/interpreter.py [--quick]        needs the extra `networks`
"""

from __future__ import annotations

import copy
import os
import sys
import time
from statistics import median

import torch
from networks import from_timm
from reporting import Claim, report, spread
from rich.progress import Progress
from torch import Tensor, nn

from partway.model.cache import captured
from partway.model.capture import call_of
from partway.model.cut import Whole, cut

NETWORKS = {"interpreter_resnet18": "resnet18", "interpreter_vit_tiny": "vit_tiny_patch16_224"}


def seconds(module: nn.Module, images: Tensor) -> float:
    """CPU seconds of one forward and backward."""
    for p in module.parameters():
        p.grad = None
    began = time.process_time()
    module(images).square().mean().backward()
    return time.process_time() - began


def ratios(name: str, pairs: int, progress: Progress) -> list[float]:
    torch.manual_seed(0)
    network, images = from_timm(name).train(), torch.randn(4, 3, 224, 224)
    programs, _ = captured(network, call_of(images))
    (piece,) = Whole(copy.deepcopy(network), programs).pieces([], (), ())
    piece.train()
    found, task = [], progress.add_task(name, total=pairs)
    for pair in range(pairs + 2):
        both = (piece, network) if pair % 2 else (network, piece)
        spent = {id(module): seconds(module, images) for module in both}
        if pair >= 2:  # the first two are warming up
            found.append(spent[id(piece)] / spent[id(network)])
            progress.advance(task)
    return found


def cutting() -> tuple[float, float]:
    """CPU seconds of capture, cut and check of resnet18, and of the same again."""
    network, images = from_timm("resnet18"), torch.randn(4, 3, 224, 224)
    spent = []
    for _ in range(2):
        began = time.process_time()
        cut(network, images, ["layer1", "layer4"])
        spent.append(time.process_time() - began)
    return spent[0], spent[1]


def main(quick: bool) -> None:
    torch.set_num_threads(1)
    pairs = 5 if quick else 31
    print(f"about {'1 minute' if quick else '2 minutes'}; nothing else should run on this machine")
    first, again = cutting()
    with Progress() as progress:
        found = {claim: ratios(name, pairs, progress) for claim, name in NETWORKS.items()}
    claims = [
        Claim(claim, median(values), "x eager PyTorch", "at most 1.05", median(values) <= 1.05)
        for claim, values in found.items()
    ]
    claims += [
        Claim("cut_resnet18", first, "CPU s, capture, cut and check", "at most 20", first <= 20),
        Claim("cut_resnet18_again", again, "CPU s, from the cache", "at most 1", again <= 1),
    ]
    lines = [f"* {NETWORKS[claim]}: {spread(values)}" for claim, values in found.items()]
    report(
        "interpreter",
        claims,
        ["Ratios of CPU seconds, median (least to most):", "", *lines],
        len(os.sched_getaffinity(0)),
        quick,
    )


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as kept:
        os.environ["PARTWAY_CACHE"] = kept
        main("--quick" in sys.argv)
