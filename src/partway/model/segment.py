"""The unit that runs: one copy of one piece of a network, all its trainable parameters in one flat one.

One flat parameter means one optimiser call, one encode for the blind sum and one frame, however many
layers a piece has.

>>> import torch
>>> from torch import nn
>>> segment = Segment(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
>>> segment.size, segment.draws, segment.gradient()
(8, False, None)
>>> segment.forward(torch.ones(4, 3), train=True).sum().backward()
>>> segment.gradient().shape
torch.Size([8])
>>> segment.clear()
>>> segment.gradient() is None
True
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from partway.errors import CutError, UsageError
from partway.model.piece import Piece


class Segment:
    """One copy of one piece, deep-copied, moved to `device` and `dtype`, and flattened.

    Backward through what `forward` returned adds into one flat gradient. In-place layers of the copy are set to work
    out of place: the values are the same, and what another party sent is never written into.

    Args:
        module: the piece, left as it is. Whatever its mode, the copy runs in the mode that `forward` is asked for.
        dtype: of all its real parameters and buffers.
        device: where it runs.

    Raises:
        CutError: the piece has complex or lazy parameters, sparse gradients, state that is no
            tensor, or cannot be copied.
    """

    module: nn.Module
    """The copy; its parameters are views of `flat`, under their original names."""
    flat: nn.Parameter | None
    """All trainable parameters in the module's order, shape (size,); None where there are none."""
    size: int
    """How many trainable numbers there are."""
    draws: bool
    """Whether a forward in training may use random numbers."""

    def __init__(
        self, module: nn.Module, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.module = standing_alone([module])[0].to(device=device, dtype=dtype).train()
        self.draws = any(map(_may_draw, self.module.modules()))
        self.flat, self._total = None, torch.empty(0, dtype=dtype, device=device)
        trainable = [p for p in self.module.parameters() if p.requires_grad]  # a tied one comes once
        self.size = sum(p.numel() for p in trainable)
        if trainable:
            self.flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in trainable]))
            self._total = torch.zeros_like(self.flat, requires_grad=False)
            sizes = [p.numel() for p in trainable]
            weights, gradients = torch.split(self.flat.detach(), sizes), torch.split(self._total, sizes)
            for p, weight, gradient in zip(trainable, weights, gradients, strict=True):
                p.data, p.grad = weight.view(p.shape), gradient.view(p.shape)

    def forward(self, inputs: Tensor, train: bool) -> Tensor:
        """What the piece makes of `inputs`, one row a record. Keeps its graph if `train`, else there is no gradient.

        Raises:
            CutError: the piece gives something else than one tensor.
        """
        if self.module.training is not train:
            self.module.train(train)
        if train:
            output = self.module(inputs)
        else:
            with torch.no_grad():
                output = self.module(inputs)
        if not isinstance(output, Tensor):
            raise CutError(f"a piece gives one tensor, not a {type(output).__name__}; cut elsewhere")
        if train and self.flat is not None and output.requires_grad:
            output.register_hook(self._arrives)  # type: ignore[no-untyped-call]
        return output

    def _arrives(self, _: Tensor) -> None:
        # Runs before the parameters of this forward get their gradients, which are views of `_total`. The optimiser
        # sees `_total` from now on, and not before: without a backward there is no gradient.
        assert self.flat is not None
        if self.flat.grad is None:
            self.flat.grad = self._total.zero_()
        elif self.flat.grad is not self._total:
            raise RuntimeError("a backward after set_gradient() would be lost; clear() comes first")

    def gradient(self) -> Tensor | None:
        """The flat gradient, shape (size,), not a copy: good until the next backward after `clear`.

        None if nothing was backpropagated since `clear`.
        """
        return None if self.flat is None else self.flat.grad

    def set_gradient(self, flat: Tensor) -> None:
        """Makes an agreed total, shape (size,), the gradient that the optimiser sees. Not copied.

        Raises:
            UsageError: another shape, dtype or device.
        """
        if self.flat is None:
            if flat.numel():
                raise UsageError(f"a gradient of {flat.numel()} numbers for a piece without trainable parameters")
            return
        mine = self.flat
        if flat.shape != mine.shape or flat.dtype != mine.dtype or flat.device != mine.device:
            raise UsageError(f"a gradient is {_describe(mine)} here, not {_describe(flat)}")
        mine.grad = flat

    def clear(self) -> None:
        """Forgets the gradient. Afterwards there is none, not zero: Adam would decay its averages on a zero."""
        if self.flat is not None:
            self.flat.grad = None

    def weights(self) -> Tensor:
        """A copy of all trainable numbers, shape (size,)."""
        return self._total.clone() if self.flat is None else self.flat.detach().clone()

    def load(self, flat: Tensor) -> None:
        """Writes all trainable numbers, shape (size,), in place.

        Raises:
            UsageError: another shape or dtype.
        """
        mine = self._total if self.flat is None else self.flat.detach()
        if flat.shape != mine.shape or flat.dtype != mine.dtype:
            raise UsageError(f"the weights are {_describe(mine)} here, not {_describe(flat)}")
        mine.copy_(flat)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all parameters and buffers by their original names, as in the whole network's state_dict."""
        return {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}

    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Writes what `tensors` gave, in place: all of it or, if anything does not fit, nothing.

        Raises:
            UsageError: a name is missing or too many, or a tensor has another shape or dtype.
        """
        mine = self.module.state_dict()
        for name in mine.keys() | named.keys():
            if name not in named:
                raise UsageError(f"`{name}` is missing among the tensors of this piece")
            if name not in mine:
                raise UsageError(f"`{name}` is not a tensor of this piece, which has {', '.join(mine)}")
            if named[name].shape != mine[name].shape or named[name].dtype != mine[name].dtype:
                raise UsageError(f"`{name}` is {_describe(mine[name])} here, not {_describe(named[name])}")
        for name, tensor in mine.items():
            tensor.detach().copy_(named[name])

    def __deepcopy__(self, memo: dict[int, Any]) -> Segment:
        # A plain deep copy would part the parameters from the flat one without a word.
        mine = self._total if self.flat is None else self.flat
        return Segment(self.module, mine.dtype, mine.device)


def shared(modules: Mapping[str, nn.Module]) -> list[dict[str, slice]]:
    """Of each trained tensor that several pieces share: where it stands in the flat parameter of each, by name.

    >>> one, other = nn.Linear(2, 3, bias=False), nn.Linear(2, 3)
    >>> other.weight = one.weight
    >>> shared({"bottom": nn.Sequential(nn.Linear(2, 2), one), "head": other})
    [{'bottom': slice(6, 12, None), 'head': slice(0, 6, None)}]
    """
    places: dict[int, dict[str, slice]] = {}
    for name, module in modules.items():
        start = 0
        for p in module.parameters():
            if p.requires_grad:
                places.setdefault(id(p), {})[name] = slice(start, start + p.numel())
                start += p.numel()
    return [found for found in places.values() if len(found) > 1]


def standing_alone(modules: Sequence[nn.Module]) -> nn.ModuleList:
    """Copies of pieces that write into nothing that they are given; what they share, their copies share.

    Raises:
        CutError: as `Segment`.
    """
    for module in modules:
        _refuse(module)
    try:
        mine = copy.deepcopy(nn.ModuleList(modules))
    except RuntimeError as error:
        raise CutError(f"this piece cannot be copied: {str(error).splitlines()[0]}") from error
    for part in mine.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]
    return mine


def initialise(module: nn.Module, secret: bytes) -> None:
    """Draws all weights of `module` anew, in place, from `secret` alone; the global generator is left as it was.

    `torch.manual_seed` keeps 32 bits on a CPU, few enough to try them all. So all 624 words of the Mersenne Twister's
    state come from SHAKE-256 over the secret, and every module's own `reset_parameters` draws from it; a segment
    that came without its code has its numbers shuffled by it.

    Args:
        module: on the CPU.
        secret: 32 bytes.

    Raises:
        UsageError: the secret has another length, or a module is not on the CPU.
        CutError: a module has parameters of its own and no `reset_parameters`, so its weights would stay known.
    """
    if len(secret) != 32:
        raise UsageError(f"first weights are drawn from a secret of 32 bytes, not {len(secret)}")
    if isinstance(module, Piece) and module.fresh is not None:
        _redraw(module, module.fresh, secret)
        return
    if (drawn := getattr(module, "drawn", None)) is not None:
        _shuffle(module, drawn, secret)
        return
    if isinstance(module, Piece):
        raise CutError("a captured piece has no first weights of its own; build its network by name")
    for name, part in module.named_modules():
        own = list(part.parameters(recurse=False))
        if own and not callable(getattr(part, "reset_parameters", None)):
            raise CutError(
                f"`{name}` ({type(part).__name__}) has no reset_parameters(), so its weights cannot be drawn anew"
            )
        if any(p.device.type != "cpu" for p in own):
            raise UsageError(f"`{name}` is not on the CPU, where first weights are drawn")
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(_generator_state(secret))
        # apply() goes to the children first, as construction does: a parent may refine what they drew.
        module.apply(lambda part: getattr(part, "reset_parameters", _nothing)())
        for part in module.modules():
            if callable(
                reset := getattr(part, "reset_lora_parameters", None)
            ):  # peft's: an adapter adds nothing at first
                for adapter in part.lora_A:  # type: ignore[union-attr]
                    reset(adapter, True)


def _redraw(piece: Piece, fresh: Callable[[], nn.Module], secret: bytes) -> None:
    """A captured piece has no modules that could draw: the whole network's own code does, and gives it its part."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(_generator_state(secret))
        drawn = fresh().state_dict()
    for name, tensor in piece.state_dict().items():
        tensor.copy_(drawn[name])


def _shuffle(module: nn.Module, drawn: Collection[str], secret: bytes) -> None:
    """Without the code that draws: a tensor's numbers in an order that nobody else knows, as likely a draw as theirs.

    So it is where a tensor's numbers are drawn independently of each other and alike, as most initialisations do; an
    orthogonal matrix comes out as one that is not.
    """
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(_generator_state(secret))
        for name, tensor in module.state_dict().items():
            if name in drawn:
                flat = tensor.reshape(-1)
                tensor.copy_(flat[torch.randperm(len(flat))].view(tensor.shape))


def has_batchnorm(module: nn.Module) -> str | None:
    """The path of the first BatchNorm, whose statistics mix a batch's records and so differ between copies; else None.

    >>> has_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    '1'
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            return name or type(part).__name__
        if mixes := getattr(part, "mixes", None):  # of a piece, or of one that another process runs
            return str(mixes)
    return None


def _nothing() -> None:
    pass


def _generator_state(secret: bytes) -> Tensor:
    """The CPU generator's whole state, freshly seeded, with its 624 words taken from the secret."""
    state = torch.Generator().manual_seed(0).get_state()
    # 64 bits each: the seed; two 32-bit counters, "left" and "seeded"; "next"; 624 words; the cached normal.
    slots = state.view(torch.int64)
    if slots.numel() != 632 or slots[1:3].tolist() != [1 | 1 << 32, 0]:
        raise RuntimeError(
            f"torch {torch.__version__} lays out its generator's state in a way that Partway does not know"
        )
    words = torch.frombuffer(bytearray(hashlib.shake_256(secret).digest(4 * 624)), dtype=torch.int32)
    slots[3 : 3 + 624] = words.to(torch.int64) & 0xFFFFFFFF
    return state


def _refuse(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if getattr(part, "sparse", False) is True:
            raise CutError(f"`{name}` ({type(part).__name__}) makes sparse gradients; build it with sparse=False")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise CutError(f"`{name}` has no shape yet; run the network once before it is cut")
        if tensor.is_complex():
            raise CutError(f"`{name}` is complex; only real networks can be cut")
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise CutError(f"`{name}` keeps state that is no tensor, and would be lost between parties")


def _may_draw(part: nn.Module) -> bool:
    if isinstance(draws := getattr(part, "draws", None), bool):  # as above
        return draws
    if isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward:
        return False  # a slice, too, only calls what it holds
    if not type(part).__module__.startswith("torch.nn."):
        return True  # code we do not know may call a functional dropout; to seed it for nothing does no harm
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return part.p > 0
    if isinstance(part, nn.RNNBase | nn.MultiheadAttention):
        return part.dropout > 0
    return isinstance(part, nn.RReLU | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
