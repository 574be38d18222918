"""From a job's words to its plan, and to the network of each segment: what every party derives alike, and nothing runs.

A network that is cut gives its pieces to a plan's segments in their order; or each segment has a network of its own,
and what several put out meets where the plan says.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from partway.config import LANED, Job, JobNetwork, Policy
from partway.data.records import Schema
from partway.errors import ConfigError, CutError, Refused, UsageError
from partway.model.adapters import with_adapters
from partway.model.cut import cut
from partway.model.norm import with_group_norm
from partway.model.pack import pack
from partway.model.recipe import build
from partway.model.segment import shared
from partway.model.sequence import first_dense
from partway.plan.configurations import extended_vanilla, multi_hop, multi_task, u_shaped, vanilla, vertical, with_skips
from partway.plan.plan import ALL, EACH, ONE, Edge, Plan, Segment
from partway.plan.private import with_stem

DTYPES = {"float32": torch.float32, "float64": torch.float64}
Schemas = Mapping[str, Schema]
"""Of each party that holds records."""
Shipped = Callable[[str, int], nn.Module]
"""(digest, most parameters) -> the segment in a signed folder, as a module."""


def nowhere(digest: str, most_parameters: int) -> nn.Module:
    """Where nobody has said where such folders lie."""
    raise UsageError(f"segment = `{digest[:12]}...` is a signed folder, and nothing says where such folders lie")


def configured(job: Job, server: str = "server") -> Plan:
    """A job's plan, with the flow `split` alone. No gradient goes back to where nothing is trained.

    Raises:
        PlanError: it is one of the job's own, and wrong: with all its faults.
        ConfigError: the job does not say who holds what.
    """
    plan = _configured(job, server)
    if job.skips:
        plan = with_skips(plan, job.skips)
    frozen = job.frozen
    for key, names in (("frozen", frozen), ("weights", job.weights)):
        for name in names:
            if name not in plan.nets:
                raise ConfigError(f"{key} names {name}; the segments are {', '.join(plan.nets)}")
    if frozen and set(plan.nets) <= set(frozen):
        raise ConfigError("every segment is frozen, so that nothing is trained")
    if "trunk" in frozen and job.training.schedule == "half_trained":
        raise ConfigError("frozen: in half_trained the server trains the trunk, which cannot be frozen")
    edges = plan.edges("split")

    def idle(name: str) -> bool:
        sources = [e.source for e in edges if e.target == name and e.kind == "activations"]
        return (name in frozen or plan[name].kind == "records") and all(map(idle, sources))

    kept = tuple(replace(e, gradient=False) if e.gradient and idle(e.source) else e for e in edges)
    return replace(plan, flows=(("split", kept),)).checked() if frozen else plan


def _configured(job: Job, server: str) -> Plan:
    training, sites = job.training, job.sites or ("site",)
    if job.plan is not None:
        return own_plan(job, server)
    if job.configuration in LANED:
        plan = vanilla(sites, server) if job.configuration == "vanilla" else u_shaped(sites, server)
        return with_stem(plan) if job.embeds else plan
    _check_parties(job, server)
    holders = [party for party, held in job.holds.items() if held.columns]
    tasks = {target: party for party, held in job.holds.items() for target in held.targets}
    if job.configuration == "multi_task":
        return multi_task(holders, tasks, server, join=training.join)
    if len(tasks) > 1:
        told = ", ".join(f"{target} at {party}" for target, party in tasks.items())
        raise ConfigError(f"{job.configuration} has one target; [holds] names {told}: multi_task has several")
    (labels,) = tasks.values()
    if job.configuration == "vertical":
        return vertical(holders, labels, server, join=training.join, head="head" in job.networks)
    if job.configuration == "extended_vanilla":
        return extended_vanilla(holders, training.middle, labels, server, join=training.join)
    return multi_hop(training.hops, labels, server)


def _check_parties(job: Job, server: str) -> None:
    """Every party that the job gives something is in its roster, and the other way round."""
    training = job.training
    named = dict.fromkeys([*job.holds, *training.hops, *([training.middle] if training.middle else [])])
    if job.roster:
        for party in named:
            if party not in (*job.roster, server):
                raise ConfigError(f"{party} has a part in {job.configuration} and is not in the roster")
        for site in job.roster:
            if site not in named:
                raise ConfigError(f"{site} is in the roster and has no part in {job.configuration}: no [holds.{site}]")
    if job.configuration == "multi_hop":
        holders = [party for party, held in job.holds.items() if held.columns]
        if holders != list(training.hops[:1]):
            raise ConfigError(f"multi_hop: the features are at the first hop, {training.hops[0]}; see [holds]")


def own_plan(job: Job, server: str) -> Plan:
    """The plan that a job has written itself."""
    assert job.plan is not None
    segments = tuple(
        Segment(name=s.name, at=s.at, copies=ONE if s.copies == "one" else EACH, kind=s.kind, join=s.join)
        for s in job.plan.segments
    )
    kinds = {s.name: s.kind for s in segments}
    back = {e: e.gradient and e.kind == "activations" and kinds.get(e.source) == "net" for e in job.plan.edges}
    edges = tuple(Edge(e.source, e.target, e.kind, gradient, e.field) for e, gradient in back.items())
    return Plan(job.sites if job.laned else (), segments, (("split", edges),), server).checked()


@dataclass(frozen=True)
class Network:
    """A job's network, in pieces."""

    whole: nn.Module
    modules: dict[str, nn.Module]
    """By segment; they share the whole's weights."""
    inputs: int
    """Of the first layer: from gradients of few records these can be solved for."""
    outputs: dict[str, Tensor]
    """What each makes of one example record, shape (1, ...)."""
    separate: bool
    """Each segment is a network of its own: in the whole, its weights' names begin with the segment's."""

    @property
    def tied(self) -> list[dict[str, slice]]:
        """Of each weight that several segments share: where it stands in their flat parameters."""
        return shared(self.modules)

    def prefix(self, segment: str) -> str:
        return f"{segment}." if self.separate else ""


def built(job: Job, policy: Policy, plan: Plan, schemas: Schemas, shipped: Shipped = nowhere) -> Network:
    """The networks of a plan's segments, built by name once the policy has allowed the names.

    Args:
        shipped: reads those that come as signed folders.

    Raises:
        Refused: a name is not allowed, or a network is too large; or a folder is not there, or may not run.
        CutError: it cannot be cut there.
        ConfigError: arguments are wrong, or a network does not fit what comes into it.
    """
    dtype = DTYPES[job.training.dtype]
    modules: dict[str, nn.Module] = {}
    if job.network is not None:
        terms = job.network
        whole = network_of_terms(terms, policy).to(dtype)
        shape = schemas[plan.holders[0]].shape
        _takes(whole, torch.zeros(4, *shape, dtype=dtype), f"[network] {terms.build}")
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(4, *shape, generator=generator).to(dtype)
        pieces = cut(whole, example, cuts_of(job, whole), owned(plan), terms.may_cross)
        pack(pieces, example, lambda: network_of_terms(terms, policy), plan.nets, job.skips)
        modules.update(zip(plan.nets, pieces, strict=True))
    else:
        _check_names(job, plan)
        for name in plan.nets:
            own = job.networks[name]
            if own.segment:
                modules[name] = _of_type(shipped(own.segment, policy.most_parameters), name, job.training.dtype)
            else:
                modules[name] = build(own.build, own.arguments, policy.networks, policy.most_parameters).to(dtype)
        whole = nn.Sequential(OrderedDict(modules)) if job.configuration in LANED else nn.ModuleDict(modules)
    for name in job.frozen:
        modules[name].requires_grad_(False)
    first = next(iter(modules.values()))
    inputs = next((p[0].numel() for p in first.parameters() if p.dim() > 1), 0)
    outputs: dict[str, Tensor] = {}
    for name in plan.nets:
        outputs[name] = _takes(
            modules[name], example_of(plan, schemas, modules, outputs, name, dtype), f"segment {name}"
        )
    return Network(whole, modules, inputs, outputs, job.network is None)


def _of_type(module: nn.Module, name: str, dtype: str) -> nn.Module:
    """A segment that came as a program, whose types stand in it."""
    for tensor in module.state_dict().values():
        if tensor.is_floating_point() and tensor.dtype is not DTYPES[dtype]:
            own = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(f"the segment of the {name} was written in {own}, and [training] dtype is {dtype}")
    return module


def owned(plan: Plan) -> list[list[int]]:
    """Numbers of the pieces that one party runs side by side, as bottom and head of a U-shape: these may be tied."""
    at: dict[tuple[str, str], list[int]] = {}
    for number, name in enumerate(plan.nets):
        at.setdefault((plan[name].at, plan[name].copies), []).append(number)
    return [numbers for numbers in at.values() if len(numbers) > 1]


def network_of_terms(terms: JobNetwork, policy: Policy) -> nn.Module:
    """The whole network that a job asks for, with weights that its own code draws."""
    whole = build(terms.build, terms.arguments, policy.networks, policy.most_parameters)
    if terms.group_norm:
        whole = with_group_norm(whole, terms.group_norm)
    if terms.lora is not None:
        lora = terms.lora
        whole = with_adapters(whole, lora.modules, lora.rank, lora.alpha, lora.train)
    return whole


def cuts_of(job: Job, whole: nn.Module) -> list[str]:
    """The modules after which a job's network is cut: those that it names, and before each site's own vector."""
    assert job.network is not None
    after = list(job.network.cut)
    if job.embeds:
        after.insert(1, first_dense(whole, *after))
    return after


class Concatenated(nn.Module):
    """What every site's bottom makes of a record, side by side, then the trunk."""

    def __init__(self, bottoms: Mapping[str, nn.Module], trunk: nn.Module) -> None:
        super().__init__()
        self.bottoms, self.trunk = nn.ModuleDict(bottoms), trunk

    def forward(self, records: Tensor) -> Tensor:
        together: Tensor = self.trunk(torch.cat([bottom(records) for bottom in self.bottoms.values()], 1))
        return together


def concatenated(network: Network, sites: Sequence[str], policy: Policy) -> Network:
    """The network with a bottom of each site, and a trunk whose first dense layer takes all that they put out.

    Its weights' names begin with `bottoms.SITE.` and `trunk.`.

    Raises:
        ConfigError: something with weights stands before the trunk's first dense layer.
        Refused: it is too large.
    """
    bottom, trunk = network.modules["bottom"], widened(network.modules["trunk"], len(sites))
    whole = Concatenated({site: copy.deepcopy(bottom) for site in sites}, trunk)
    if (size := sum(p.numel() for p in whole.parameters())) > policy.most_parameters:
        words = f"{size:,} parameters with all bottoms; [policy] most_parameters is {policy.most_parameters:,}"
        raise Refused(words, ["NETWORK_SIZE"])
    _takes(trunk, torch.cat([network.outputs["bottom"]] * len(sites), 1), "the trunk behind all bottoms")
    return replace(network, whole=whole, modules={**network.modules, "trunk": trunk}, separate=True)


def widened(trunk: nn.Module, times: int) -> nn.Module:
    """A copy of which the first dense layer takes so many times as many inputs or channels. Its weights are new."""
    trunk = copy.deepcopy(trunk)
    for path, layer in trunk.named_modules():
        if not list(layer.parameters(recurse=False)):
            continue
        wide: nn.Module
        if isinstance(layer, nn.Linear):
            wide = nn.Linear(times * layer.in_features, layer.out_features, layer.bias is not None)
        elif isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == 1 and not layer.transposed:
            same = {
                name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            }
            wide = type(layer)(times * layer.in_channels, layer.out_channels, bias=layer.bias is not None, **same)
        else:
            break
        trunk.set_submodule(path, wide.to(next(layer.parameters()).dtype))
        return trunk
    raise ConfigError(
        "bottoms = `concatenated` needs a trunk whose first layer with weights is linear or a convolution"
    )


def example_of(
    plan: Plan,
    schemas: Schemas,
    modules: Mapping[str, nn.Module],
    outputs: Mapping[str, Tensor],
    name: str,
    dtype: torch.dtype,
) -> Tensor:
    """What comes into a segment for one record, from what the segments before it put out."""
    parts = []
    for edge in plan.edges("split"):
        if edge.target == name and edge.kind == "activations":
            source = plan[edge.source]
            if source.kind == "records":
                at = plan.place(plan.copies(source.name)[0])
                parts.append(torch.zeros(1, *schemas[at].shape, dtype=dtype))
            else:
                parts.append(_portion(edge, modules[edge.source], outputs[edge.source].detach()))
    shapes = {tuple(part.shape) for part in parts}
    if len(parts) > 1 and plan[name].join == "sum" and len(shapes) > 1:
        raise ConfigError(f"segment {name} adds what comes in, and the shapes differ: {sorted(shapes)}")
    if len(parts) > 1 and len({shape[2:] for shape in shapes}) > 1:
        raise ConfigError(f"segment {name} puts side by side what comes in, and the shapes differ: {sorted(shapes)}")
    return torch.stack(parts).sum(0) if plan[name].join == "sum" else torch.cat(parts, 1)


def _portion(edge: Edge, module: nn.Module, output: Tensor) -> Tensor:
    """What of a segment's output goes along an edge."""
    if edge.portion == ALL:
        return output
    packed = getattr(module, "packed", None)
    if packed is None or edge.portion >= len(packed.widths):
        raise ConfigError(f"skip: the {edge.source} does not put out something else for each segment that it leads to")
    return torch.split(output, packed.widths, 1)[edge.portion]


def _check_names(job: Job, plan: Plan) -> None:
    missing = [name for name in plan.nets if name not in job.networks]
    more = [name for name in job.networks if name not in plan.nets]
    if missing or more:
        told = [f"[networks.{name}] is missing" for name in missing]
        told += [f"[networks.{name}] belongs to no segment of {job.configuration}" for name in more]
        raise ConfigError("; ".join(told))


def _takes(module: nn.Module, example: Tensor, what: str) -> Tensor:
    """What a module makes of an example. Raises `ConfigError` if it does not take it."""
    shape, training = tuple(example.shape[1:]), module.training
    module.eval()
    try:
        with torch.no_grad():
            output = module(example)
    except (RuntimeError, CutError) as error:
        gives = f"a record gives {math.prod(shape)} inputs: " if len(shape) == 1 else ""
        words = f"{what} takes no records of shape {shape}: {gives}{str(error).splitlines()[0]}"
        raise ConfigError(words) from None
    finally:
        module.train(training)
    if not isinstance(output, Tensor):
        raise ConfigError(f"{what} gives a {type(output).__name__}, and not one tensor")
    return output
