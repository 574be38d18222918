"""The operators that a program may run, letter by letter, and what must be known of each.

None reads a file, runs code, looks into memory that is not its arguments', or takes its memory without filling it.

>>> find("aten.relu_.default").writes, find("aten.dropout.default").random
(('self',), True)
>>> find("aten.from_file.default")
Traceback (most recent call last):
partway.errors.CutError: `aten.from_file.default` is not among the operators that a segment may run
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partway.errors import CutError
from partway.model.program import Node, references

_ATEN = """
__and__:Tensor __or__:Tensor __xor__:Tensor _prelu_kernel _to_copy _unsafe_view _upsample_bicubic2d_aa:default,vec
_upsample_bilinear2d_aa:default,vec _upsample_nearest_exact1d:default,vec _upsample_nearest_exact2d:default,vec
_upsample_nearest_exact3d:default,vec _weight_norm _weight_norm_interface abs abs_ acos acos_ acosh acosh_
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d add:Scalar,Tensor add_:Scalar,Tensor addbmm addbmm_ addcdiv addcdiv_ addcmul addcmul_ addmm addmm_
adjoint affine_grid_generator alias all:default,dim,dims alpha_dropout alpha_dropout_ amax amin any:default,dim,dims
arange:default,start,start_step argmax argmin argsort:default,stable asin asin_ asinh asinh_ atan atan2 atan2_ atan_
atanh atanh_ atleast_1d:Sequence,default atleast_2d:Sequence,default atleast_3d:Sequence,default avg_pool1d avg_pool2d
avg_pool3d baddbmm baddbmm_ batch_norm bernoulli:Tensor,default,p bernoulli_:Tensor,float bilinear
bitwise_and:Scalar,Tensor bitwise_and_:Scalar,Tensor bitwise_not bitwise_not_ bitwise_or:Scalar,Tensor
bitwise_or_:Scalar,Tensor bitwise_xor:Scalar,Tensor bitwise_xor_:Scalar,Tensor bmm broadcast_to bucketize:Tensor cat
cdist ceil ceil_ celu celu_ channel_shuffle chunk clamp:Tensor,default clamp_:Tensor,default clamp_max:Tensor,default
clamp_max_:Tensor,default clamp_min:Tensor,default clamp_min_:Tensor,default clip:Tensor,default clip_:Tensor,default
clone col2im complex concat concatenate constant_pad_nd contiguous conv1d:default,padding conv2d:default,padding
conv3d:default,padding conv_transpose1d conv_transpose2d:input conv_transpose3d:input convolution copy_ cos cos_ cosh
cosh_ cosine_similarity cross cross_entropy_loss cummax cumprod cumprod_ cumsum cumsum_ detach detach_ diag_embed
diagonal diff dist div:Scalar,Scalar_mode,Tensor,Tensor_mode div_:Scalar,Scalar_mode,Tensor,Tensor_mode dot dropout
dropout_ einsum elu elu_ embedding eq:Scalar,Tensor eq_:Scalar,Tensor erf erf_ erfc erfc_ exp exp2 exp2_ exp_ expand
expand_as expm1 expm1_ exponential_ eye:default,m feature_alpha_dropout feature_alpha_dropout_ feature_dropout
feature_dropout_ fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft
fft_irfft2 fft_rfft fft_rfft2 fill_:Scalar,Tensor flatten:using_ints flip fliplr floor floor_
floor_divide:Scalar,default floor_divide_:Scalar,Tensor fmax fmin fmod:Scalar,Tensor fmod_:Scalar,Tensor frac frac_
full full_like gather ge:Scalar,Tensor ge_:Scalar,Tensor gelu gelu_ glu grid_sampler grid_sampler_2d grid_sampler_3d
group_norm gru:input gru_cell gt:Scalar,Tensor gt_:Scalar,Tensor hann_window hardshrink hardsigmoid hardsigmoid_
hardswish hardswish_ hardtanh hardtanh_ hstack im2col imag index:Tensor index_add index_add_
index_fill:int_Scalar,int_Tensor index_fill_:int_Scalar,int_Tensor index_put index_put_ index_select instance_norm
isfinite isinf isnan kthvalue layer_norm le:Scalar,Tensor le_:Scalar,Tensor leaky_relu leaky_relu_ lerp:Scalar,Tensor
lerp_:Scalar,Tensor lift_fresh_copy linalg_cholesky linalg_cross linalg_inv linalg_matrix_norm:default,str_ord
linalg_norm:default,ord_str linalg_qr linalg_solve linalg_vecdot linalg_vector_norm linear linspace log log10 log10_
log1p log1p_ log2 log2_ log_ log_softmax:int logcumsumexp logical_and logical_and_ logical_not logical_not_ logical_or
logical_or_ logical_xor logical_xor_ logit logit_ logsumexp lstm:input lstm_cell lt:Scalar,Tensor lt_:Scalar,Tensor mH
mT masked_fill:Scalar,Tensor masked_fill_:Scalar,Tensor masked_scatter masked_scatter_ matmul matrix_H
max:default,dim,other max_pool1d max_pool2d max_pool2d_with_indices max_pool3d maximum mean:default,dim
median:default,dim meshgrid:default,indexing min:default,dim,other minimum mish mish_ mm movedim:int,intlist mse_loss
mul:Scalar,Tensor mul_:Scalar,Tensor mv nan_to_num nan_to_num_ nanmean nansum narrow native_group_norm
native_layer_norm ne:Scalar,Tensor ne_:Scalar,Tensor neg neg_ new_full new_ones new_zeros nll_loss
norm:Scalar,ScalarOpt_dim,ScalarOpt_dim_dtype,ScalarOpt_dtype normal_ numpy_T one_hot ones ones_like outer pad
pairwise_distance permute pixel_shuffle pixel_unshuffle polar pow:Scalar,Tensor_Scalar,Tensor_Tensor
pow_:Scalar,Tensor prelu prod:default,dim_int rand rand_like randn randn_like real reciprocal reciprocal_
reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 relu6_ relu_ remainder:Scalar,Scalar_Tensor,Tensor
remainder_:Scalar,Tensor repeat repeat_interleave:self_Tensor,self_int replication_pad1d replication_pad2d
replication_pad3d reshape reshape_as rms_norm rnn_relu:input rnn_relu_cell rnn_tanh:input rnn_tanh_cell roll rot90
round:decimals,default round_:decimals,default rrelu rrelu_ rsqrt rsqrt_ rsub:Scalar,Tensor scalar_tensor
scaled_dot_product_attention scatter:reduce,src,value,value_reduce scatter_:reduce,src,value,value_reduce scatter_add
scatter_add_ searchsorted:Tensor select:int select_scatter selu selu_ sigmoid sigmoid_ sign sign_ silu silu_ sin sin_
sinc sinc_ sinh sinh_ slice:Tensor slice_scatter softmax:int softplus softshrink sort:default,stable
split:Tensor,default,sizes split_with_sizes sqrt sqrt_ square square_ squeeze:default,dim,dims
squeeze_:default,dim,dims stack std:correction,default,dim std_mean:correction,default,dim sub:Scalar,Tensor
sub_:Scalar,Tensor sum:default,dim_IntList swapaxes swapaxes_ swapdims swapdims_ sym_numel sym_size:int t t_
take_along_dim tan tan_ tanh tanh_ tensor_split:indices,sections tensordot threshold threshold_ tile
to:device,dtype,dtype_layout,other topk trace transpose:int transpose_ tril tril_ tril_indices triu triu_ triu_indices
true_divide:Scalar,Tensor true_divide_:Scalar,Tensor trunc trunc_ type_as unbind:int unflatten:int unfold uniform_
unsqueeze unsqueeze_ upsample_bicubic2d:default,vec upsample_bilinear2d:default,vec upsample_linear1d:default,vec
upsample_nearest1d:default,vec upsample_nearest2d:default,vec upsample_nearest3d:default,vec
upsample_trilinear3d:default,vec var:correction,default,dim var_mean:correction,default,dim vdot view:default,dtype
view_as view_as_complex view_as_real vstack where:Scalar,ScalarOther,ScalarSelf,self zero_ zeros zeros_like
"""
"""`name:overload,overload`; a name alone has the overload `default`."""

_ON_NUMBERS: Mapping[str, Callable[..., Any]] = {
    "py.add": operator.add,
    "py.sub": operator.sub,
    "py.mul": operator.mul,
    "py.floordiv": operator.floordiv,
    "py.truediv": operator.truediv,
    "py.mod": operator.mod,
    "py.neg": operator.neg,
    "py.eq": operator.eq,
    "py.ne": operator.ne,
    "py.lt": operator.lt,
    "py.le": operator.le,
    "py.gt": operator.gt,
    "py.ge": operator.ge,
    "py.and_": operator.and_,
    "py.or_": operator.or_,
    "py.getitem": operator.getitem,
    "py.ceil": math.ceil,
    "py.floor": math.floor,
    "py.trunc": math.trunc,
    "sym.max": torch.sym_max,
    "sym.min": torch.sym_min,
    "sym.not": torch.sym_not,
    "sym.float": torch.sym_float,
    "sym.int": torch.sym_int,
    "sym.sum": torch.sym_sum,
}
"""What a program does with sizes, and with operators that give several tensors."""

_VIEWS = """
reshape flatten unflatten contiguous to _to_copy type_as expand_as view_as reshape_as dropout feature_dropout
alpha_dropout feature_alpha_dropout pad constant_pad_nd movedim swapaxes swapdims tensor_split chunk split narrow
broadcast_to atleast_1d atleast_2d atleast_3d meshgrid squeeze numpy_T mT mH matrix_H adjoint diagonal unbind real
imag fliplr
"""
_MAY_VIEW = frozenset(_VIEWS.split())
"""Those that may give back the memory they got, and do not say so in their schema."""

_KEEPS_STATISTICS = {"aten.batch_norm.default": 5, "aten.instance_norm.default": 5}
"""Normalisations that write running statistics, which their schema does not say: where the argument is that asks."""


@dataclass(frozen=True)
class Operator:
    """One operator."""

    name: str
    call: Callable[..., Any]
    arguments: tuple[str, ...] = ()
    """Names of all of them, in order."""
    writes: tuple[str, ...] = ()
    """Those that are written in place."""
    views: tuple[str, ...] = ()
    """Those whose memory what comes out may share."""
    random: bool = False


@functools.cache
def allowed() -> frozenset[str]:
    """The names of all operators that a program may run."""
    names = set(_ON_NUMBERS)
    for word in _ATEN.split():
        name, _, overloads = word.partition(":")
        names.update(f"aten.{name}.{overload}" for overload in (overloads or "default").split(","))
    return frozenset(names)


@functools.cache
def find(name: str) -> Operator:
    """The operator called `name`, letter by letter.

    Raises:
        CutError: it is not among those allowed, or this PyTorch has none of that name.
    """
    if name not in allowed():
        raise CutError(f"`{name}` is not among the operators that a segment may run")
    if name in _ON_NUMBERS:
        return Operator(name, _ON_NUMBERS[name], views=("0",) if name == "py.getitem" else ())
    _, base, overload = name.split(".")
    packet = getattr(torch.ops.aten, base, None)  # both are of our own list
    call = getattr(packet, overload, None)
    if not isinstance(call, torch._ops.OpOverload):
        raise CutError(f"`{name}` is unknown to torch {torch.__version__}; the sites need the torch of who cut this")
    arguments = call._schema.arguments
    aliased = [(a.name, a.alias_info.is_write) for a in arguments if a.alias_info is not None]
    return Operator(
        name,
        call,
        tuple(a.name for a in arguments),
        tuple(argument for argument, written in aliased if written),
        (arguments[0].name,) if base in _MAY_VIEW else tuple(argument for argument, written in aliased if not written),
        torch.Tag.nondeterministic_seeded in call.tags or "dropout" in base or base.startswith(("lstm", "gru", "rnn")),
    )


def values_at(node: Node, argument: str) -> list[str]:
    """The values that stand as one argument of a node."""
    operator = find(node.operator)
    if node.operator == "py.getitem":
        return list(references(node.args[0]))
    where = operator.arguments.index(argument)
    return list(references(node.args[where] if where < len(node.args) else node.kwargs.get(argument)))


def written(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The argument that a call writes in place and gives back; None if it writes none."""
    operator = find(name)
    if not operator.writes:
        return None
    where = operator.arguments.index(operator.writes[0])
    return args[where] if where < len(args) else kwargs[operator.writes[0]]


def lasting(name: str, args: Sequence[Any]) -> bool:
    """Whether a call leaves something behind besides what it gives."""
    return bool(find(name).writes) or keeps_statistics(name, args)


def keeps_statistics(name: str, arguments: Sequence[Any]) -> bool:
    """Whether this call updates running statistics, of the batch."""
    where = _KEEPS_STATISTICS.get(name)
    return where is not None and bool(arguments[where]) and arguments[3] is not None


def check_recurrent(name: str, arguments: Sequence[Any]) -> None:
    """Refuses what would make a recurrent operator write beyond its memory, which PyTorch does not.

    Raises:
        CutError: the first state or a weight has another shape than the inputs and the layers ask for.
    """
    inputs, first, weights, biases, layers, _, _, both, batch_first = arguments
    states = list(first) if isinstance(first, list | tuple) else [first]
    ways, gates = 2 if both else 1, {"lstm": 4, "gru": 3}.get(name.split(".")[1], 1)
    tensors = [inputs, *states, *weights]
    if not all(isinstance(t, Tensor) for t in tensors) or inputs.dim() != 3 or not 0 < layers <= 64:
        raise CutError(f"`{name}` takes inputs of three dimensions, tensors and 1 to 64 layers")
    if len({t.dtype for t in tensors}) > 1 or len({t.device for t in tensors}) > 1:
        raise CutError(f"`{name}` takes inputs, states and weights of one type on one device")
    batch = inputs.shape[0] if batch_first else inputs.shape[1]
    hidden = states[-1].shape[-1] if states[-1].dim() == 3 else 0
    kept = states[0].shape[-1] if states[0].dim() == 3 else 0  # less than `hidden` in an LSTM with projections
    expected = [(layers * ways, batch, size) for size in ((kept, hidden) if len(states) == 2 else (kept,))]
    if [tuple(s.shape) for s in states] != expected or len(states) != (2 if gates == 4 else 1) or 0 in (hidden, kept):
        raise CutError(f"`{name}` takes a first state of {layers * ways} x {batch} rows, a row for each of the inputs")
    shapes: list[tuple[int, ...]] = []
    for layer in range(layers):
        wide = inputs.shape[2] if layer == 0 else kept * ways
        for _ in range(ways):
            shapes += [(gates * hidden, wide), (gates * hidden, kept)]
            shapes += [(gates * hidden,)] * 2 if biases else []
            shapes += [(kept, hidden)] if kept != hidden else []
    if [tuple(w.shape) for w in weights] != shapes:
        raise CutError(f"`{name}` takes weights of shapes {shapes} for these inputs")
