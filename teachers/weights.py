"""The runner's weights: products of one input fused, the experts of a layer, and how ranks have them answer.

Weights are fused once, and the modules' parameters become views of them: nothing is held twice.

Shape legend: T tokens of this rank, G of all shares, S shares, K experts a token, E hidden size, X experts, F their
width.
"""

from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from teachers.mesh import Mesh
from teachers.scaled import ScaledWeights


@dataclass
class Experts:
    """The routed and shared experts of one layer."""

    gate: Tensor
    bias: Tensor
    gate_up: Tensor | ScaledWeights
    down: Tensor | ScaledWeights
    shared_gate_up: Tensor
    shared_down: Tensor
    router: dict = field(default_factory=dict)


def fuse(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight [sum of outputs, inputs] and bias; the modules' own become views of it."""
    weight = torch.cat([linear.weight.data for linear in linears])
    bias = None
    if any(linear.bias is not None for linear in linears):
        absent = lambda linear: weight.new_zeros(len(linear.weight))  # noqa: E731
        bias = torch.cat([absent(one) if one.bias is None else one.bias.data for one in linears])
    for linear, part in zip(linears, weight.split([len(linear.weight) for linear in linears])):
        linear.weight.data = part
    return weight, bias


def experts_of(mlp: nn.Module, config, mesh: Mesh | None) -> Experts:
    """Those of a layer that answer on this rank, from the module of transformers or of DeepSpeed AutoEP."""
    router = {
        "top_k": config.num_experts_per_tok,
        "groups": config.n_group,
        "top_groups": config.topk_group,
        "normed": config.norm_topk_prob,
        "scale": config.routed_scaling_factor,
    }
    choice = mlp.router if hasattr(mlp, "router") else mlp.gate
    gate_XE = choice.gate.weight.data if hasattr(mlp, "router") else choice.weight.data
    shared, (gate_up, down) = mlp.shared_experts, _routed_weights(mlp.experts)
    if mesh:
        router["here"] = mesh.split.answering_experts(len(gate_XE))
        first = router["here"].start - mesh.split.held_experts(len(gate_XE)).start
        gate_up, down = (_some(weights, first, len(router["here"])) for weights in (gate_up, down))
    return Experts(
        gate_XE,
        choice.e_score_correction_bias.float(),
        gate_up,
        down,
        fuse([shared.gate_proj, shared.up_proj])[0],
        shared.down_proj.weight.data,
        router,
    )


def _routed_weights(experts: nn.Module) -> list[Tensor | ScaledWeights]:
    """The experts of this rank: gates above ups [X, 2F, E], downs [X, E, F]."""
    if not hasattr(experts, "w1"):
        found = experts.gate_up_proj, experts.down_proj
        return [of if isinstance(of, ScaledWeights) else of.data for of in found]
    gate_up, width = torch.cat((experts.w1.data, experts.w3.data), dim=1), experts.w1.shape[1]
    experts.w1.data, experts.w3.data = gate_up[:, :width], gate_up[:, width:]
    return [gate_up, experts.w2.data]


def _some(weights: Tensor | ScaledWeights, first: int, count: int) -> Tensor | ScaledWeights:
    if isinstance(weights, ScaledWeights):
        parts = (part[first : first + count] for part in (weights.values_XPNK, weights.scales_XPRC))
        return ScaledWeights(*parts)
    return weights[first : first + count]


def routed(ops: ModuleType, mesh: Mesh, experts: Experts, x_TE: Tensor, active_1: Tensor) -> Tensor:
    """Parts [T, P, E] of what the routed experts say, to be added up over P and over the tensor group's ranks.

    Called by all shares.
    """
    if mesh.shares == 1:
        return ops.combine(*_answers(ops, experts, x_TE, active_1)).unsqueeze(1)
    if mesh.peers and mesh.stretches[0].counts_S is mesh.step_counts_S:
        return mesh.peers.scatter(*_answers(ops, experts, mesh.peers.gather(x_TE), mesh.step_counts_S))
    answered = lambda s: ops.combine(*_answers(ops, experts, mesh.gather(x_TE, s), s.counts_S))  # noqa: E731
    parts = [mesh.scatter(answered(stretch)) for stretch in mesh.stretches]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[: len(x_TE)].unsqueeze(1)


def _answers(ops: ModuleType, experts: Experts, x_GE: Tensor, active_S: Tensor) -> tuple[Tensor, Tensor, int]:
    """What each choice's expert says [G, K, E], the choices [G, K], and the number of experts that are here."""
    chosen_GK, weight_GK = ops.route(x_GE, experts.gate, experts.bias, active_S, **experts.router)
    work = ops.group(chosen_GK, experts.gate_up, len(experts.gate))
    return ops.experts(x_GE, work, weight_GK, experts.gate_up, experts.down), chosen_GK, len(experts.gate_up)
