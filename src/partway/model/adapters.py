"""Low-rank adapters beside a network's own weights, which stay as they are: LoRA, by the package peft (an extra)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from partway.errors import UsageError
from partway.model.capture import copied


def with_adapters(network: nn.Module, modules: Sequence[str], rank: int, alpha: int, train: Sequence[str]) -> nn.Module:
    """A copy in which some layers have adapters, which alone are trained (Hu et al., 2021, arXiv:2106.09685).

    At first an adapter adds nothing: one of its two matrices is drawn, the other zero.

    Args:
        modules: paths, or the last names of paths, of dense layers, convolutions or embeddings.
        rank: of the product that is added to a layer's weights.
        alpha: what is added is multiplied by `alpha / rank`.
        train: beginnings of the names of parameters that are trained as they are, such as of a new last layer.

    Raises:
        UsageError: peft is not installed, or there is no such layer, or it can have no adapter.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(f"adapters need one more package: install partway[lora] ({error})") from None
    made = copied(network)
    try:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules)), made)
    except ValueError as error:
        raise UsageError(f"[network.lora] modules: {str(error).splitlines()[0]}") from None
    for name, p in made.named_parameters():
        if name.startswith(tuple(train)) and "lora_" not in name:
            p.requires_grad_(True)
    return made
