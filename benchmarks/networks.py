"""The networks of others that the benchmarks cut: timm, Hugging Face, MONAI, and two of the kinds that hospitals have.

Needs the extra `networks`. Weights are random; nothing is downloaded.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 6
"""Of the examples."""


class _Named(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Nothing(metaclass=_Named):
    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class _InName(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (_Nothing,), {})


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """timm asks for torchvision, which fails to import beside some builds of PyTorch, and is not needed here."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec: Any) -> Any:
        return _InName(spec.name)

    def exec_module(self, module: Any) -> None:
        module.__version__ = "0"


def from_timm(name: str, **more: Any) -> nn.Module:
    if not any(isinstance(finder, _Torchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Torchvision())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm

        made: nn.Module = timm.create_model(name, num_classes=7, **more)
    return made


def _bert() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=100, **sizes))


def _gpt2() -> nn.Module:
    import transformers

    ends = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4, **ends))


def _monai(name: str, *args: Any, **more: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import monai.networks.nets as nets

        made: nn.Module = getattr(nets, name)(*args, **more)
    return made


class Signal(nn.Module):
    """Twelve leads through a convolution and a recurrent layer, as for an electrocardiogram."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.conv, self.drop, self.out = nn.Conv1d(12, 16, 5, stride=2), nn.Dropout(0.2), nn.Linear(64, 2)
        self.rnn = kind(16, 32, 2, batch_first=True, bidirectional=True, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(self.conv(x).relu().transpose(1, 2))
        return self.out(self.drop(h.mean(1)))


class Table(nn.Module):
    """Categories in embeddings beside numbers, which are used again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.categories = nn.ModuleList([nn.Embedding(n, 4) for n in (5, 7, 3)])
        self.numbers, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.hidden, self.second = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.1)), nn.Linear(32, 16)
        self.out = nn.Linear(16 + 8, 2)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        n = self.norm(self.numbers(numbers))
        each = [module(categories[:, i]) for i, module in enumerate(self.categories)]
        h = self.second(self.hidden(torch.cat([*each, n], 1))).relu()
        return self.out(torch.cat([h, n], 1))


@dataclass(frozen=True)
class Case:
    """A network, what it is called with, and where it is cut."""

    make: Callable[[], nn.Module]
    args: tuple[Any, ...]
    cuts: tuple[Sequence[str], ...]
    """Into two, and into three."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    may_cross: Sequence[str] = ()
    around: bool = False
    """The first and the last piece belong to one party, as their weights are tied."""


def _image(channels: int = 3, side: int = 64) -> tuple[Tensor]:
    return (torch.randn(ROWS, channels, side, side, generator=torch.Generator().manual_seed(1)),)


def _text() -> dict[str, Tensor]:
    ids = torch.randint(0, 100, (ROWS, 12), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([12, 7, 9, 12, 3, 10])[:, None]
    return {"input_ids": ids, "attention_mask": (torch.arange(12) < lengths).long()}


CASES: dict[str, Case] = {
    "resnet18": Case(lambda: from_timm("resnet18"), _image(), (["layer1"], ["layer1", "layer4"])),
    "resnet50": Case(lambda: from_timm("resnet50"), _image(), (["layer1.0.conv2"], ["layer1", "layer4"])),
    "densenet121": Case(
        lambda: from_timm("densenet121"),
        _image(),
        (["features.denseblock1"], ["features.denseblock1", "features.denseblock4"]),
    ),
    "convnext_nano": Case(
        lambda: from_timm("convnext_nano", drop_path_rate=0.1), _image(), (["stages.0"], ["stages.0", "stages.3"])
    ),
    "vit_tiny": Case(
        lambda: from_timm("vit_tiny_patch16_224", img_size=64, drop_path_rate=0.1, proj_drop_rate=0.1),
        _image(),
        (["blocks.1.attn"], ["blocks.1", "blocks.10"]),
    ),
    "efficientnet_b0": Case(
        lambda: from_timm("efficientnet_b0", drop_path_rate=0.1, drop_rate=0.1),
        _image(),
        (["blocks.1"], ["blocks.1", "blocks.5"]),
    ),
    "bert": Case(
        _bert,
        (),
        (["bert.encoder.layer.0"], ["bert.encoder.layer.0", "bert.pooler"]),
        _text(),
        ("attention_mask",),
    ),
    "gpt2, tied": Case(
        _gpt2,
        (),
        (["transformer.h.1"], ["transformer.h.0", "transformer.h.2"]),
        _text(),
        ("attention_mask",),
        around=True,
    ),
    "monai UNet": Case(
        lambda: _monai("UNet", 2, 1, 2, (8, 16, 32), (2, 2), num_res_units=1, dropout=0.1),
        _image(1, 32),
        (["model.1.submodule.0"], ["model.0", "model.1"]),
    ),
    "monai DenseNet121": Case(
        lambda: _monai("DenseNet121", 2, 1, 3),
        _image(1),
        (["features.denseblock1"], ["features.denseblock1", "features.denseblock4"]),
    ),
    "lstm": Case(
        lambda: Signal(nn.LSTM),
        (torch.randn(ROWS, 12, 200, generator=torch.Generator().manual_seed(3)),),
        (["conv"], ["conv", "rnn"]),
    ),
    "gru": Case(
        lambda: Signal(nn.GRU),
        (torch.randn(ROWS, 12, 200, generator=torch.Generator().manual_seed(3)),),
        (["conv"], ["conv", "rnn"]),
    ),
    "table": Case(
        Table,
        (
            torch.randint(0, 3, (ROWS, 3), generator=torch.Generator().manual_seed(4)),
            torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(5)),
        ),
        (["hidden"], ["hidden", "second"]),
    ),
}
