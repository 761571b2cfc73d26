# SPDX-License-Identifier: Apache-2.0
r"""Summing discrete latents out of a traced model.

For continuous latents ``θ``, enumerated discrete latents ``d`` and a scale ``s`` (a mini-batch factor, say)

    log p̃(θ) = Σ_{sites without d} s_i log p_i(θ)  +  s · log Σ_d Π_{sites with d} p_i(d, θ):

masks go inside the sum, the scale outside, as in ``TraceEnum_ELBO`` (and unlike Pyro's HMC, which raises
every factor to the power ``s`` before summing).

The sums are contracted by ``opt_einsum``, which takes its arithmetic from a module: this one. Its
:func:`einsum` is a log-sum-exp that differentiates once, twice, under ``vmap`` and under ``make_fx``; Pyro's
own log-sum-exp uses an old-style autograd function and does none of the last three.
"""

from __future__ import annotations

from collections import OrderedDict
from string import ascii_letters
from typing import Any

import torch
from opt_einsum import shared_intermediates
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_sm.base import ModelRefusedError


def transpose(a: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``a`` with its dimensions in the order ``axes``: a function that ``opt_einsum`` asks its backend for."""
    return a.permute(axes)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """``log Σ exp`` einsum: products are sums of logs, sums are log-sum-exps. ``opt_einsum`` backend
    interface.

    Where everything summed is ``-inf`` the result is ``-inf`` with a zero gradient.
    """
    rename = dict(zip(sorted(set(equation) - set(",->")), ascii_letters, strict=False))
    inputs_all, output = "".join(rename.get(symbol, symbol) for symbol in equation).split("->")
    inputs = inputs_all.split(",")
    if inputs == [output]:
        return operands[0].clone()  # a new object: the caller hangs attributes on it
    largest = max(inputs, key=len)
    if set("".join(inputs)) == set(largest):  # nothing to gain from a matrix product
        aligned = (_aligned(operand, dims, largest) for dims, operand in zip(inputs, operands, strict=True))
        summed = [i for i, dim in enumerate(largest) if dim not in output]
        total = _log_sum_exp(sum(aligned, operands[0].new_zeros(())), summed)
        kept = "".join(dim for dim in largest if dim in output)
        return total.permute([kept.index(dim) for dim in output])
    shifts, factors = [], []
    for dims, operand in zip(inputs, operands, strict=True):
        summed = [i for i, dim in enumerate(dims) if dim not in output]
        shift = _shift(operand, summed)
        factors.append((operand - shift).exp())
        kept = "".join(dim for dim in dims if dim in output)
        shifts.append(_aligned(shift.squeeze(summed), kept, output))
    return sum(shifts, _safe_log(torch.einsum(f"{','.join(inputs)}->{output}", factors)))


def _aligned(operand: Tensor, dims: str, target: str) -> Tensor:
    """Permute ``dims`` into the order of ``target``, with size one where ``target`` has more."""
    order = sorted(range(len(dims)), key=lambda i: target.index(dims[i]))
    sizes = dict(zip(dims, operand.shape, strict=True))
    return operand.permute(order).reshape([sizes.get(dim, 1) for dim in target])


def _shift(operand: Tensor, summed: list[int]) -> Tensor:
    """The maximum over ``summed``, kept as dimensions of size one; finite, as -inf − -inf is NaN."""
    shift = operand.detach()
    if summed:
        shift = shift.amax(summed, keepdim=True)
    return shift.clamp(min=torch.finfo(shift.dtype).min)


def _safe_log(total: Tensor) -> Tensor:
    """``log`` with the value -inf and the gradient zero at zero."""
    return torch.where(total > 0, total.clamp(min=torch.finfo(total.dtype).tiny).log(), -torch.inf)


def _log_sum_exp(x: Tensor, dims: list[int]) -> Tensor:
    if not dims:
        return x
    shift = _shift(x, dims)
    return _safe_log((x - shift).exp().sum(dims)) + shift.squeeze(dims)


tensordot = Tensordot(einsum)


class FunctionalLogRing(LogRing):
    """Pyro's log ring with the arithmetic of this module."""

    _backend = __name__


class FunctionalEnumMessenger(EnumMessenger):
    """Pyro's parallel enumeration without its use of ``.data``, which ``vmap`` does not allow."""

    def _pyro_post_sample(self, msg: Message) -> None:
        value, fn = msg["value"], msg["fn"]
        infer: Any = msg["infer"]
        if value is None or infer is None or not hasattr(fn, "event_dim"):
            return
        shape = value.shape[: value.dim() - fn.event_dim]
        dim_to_id = infer.setdefault("_dim_to_id", {})
        dim_to_id.update(self._param_dims.get(str(msg["name"]), {}))
        self._value_dims[str(msg["name"])] = {
            dim: id_ for dim, id_ in dim_to_id.items() if len(shape) >= -dim and shape[dim] > 1
        }


class EnumerateSites(Messenger):
    """Marks the named sites for exact parallel enumeration, whatever annotation the model gave them."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self.names and msg["infer"] is not None:
            msg["infer"] = {k: v for k, v in msg["infer"].items() if k not in ("num_samples", "tmc")}  # type: ignore[typeddict-item]
            msg["infer"]["enumerate"] = "parallel"


def _common_scale(scales: dict[str, float | Tensor]) -> float | Tensor:
    for name, scale in scales.items():
        if isinstance(scale, Tensor) and scale.dim():
            raise ModelRefusedError(
                f"site {name!r} depends on an enumerated discrete latent and has a scale of shape "
                f"{tuple(scale.shape)}: only scalar poutine.scale can be taken out of the sum"
            )
    if len({float(scale) for scale in scales.values()}) > 1:
        listed = ", ".join(f"{name!r}: {float(scale):g}" for name, scale in scales.items())
        raise ModelRefusedError(
            f"sites that share an enumerated discrete latent must share one scale, found {listed}; "
            "put the same poutine.scale (or the same subsampled plate) around all of them"
        )
    return next(iter(scales.values()))


def _sum_but(term: Tensor, symbol: str | None) -> Tensor:
    """Sum a packed tensor over every dimension but ``symbol``."""
    others = [i for i, dim in enumerate(term._pyro_dims) if dim != symbol]  # type: ignore[attr-defined]
    return term.sum(others) if others else term


def enumerated_log_joint(trace: Trace, batch_plate: str | None) -> Tensor:
    """``log p̃`` of a trace with enumerated sites: (B,) if ``batch_plate`` names the plate of the batch, else
    ().

    Raises:
        ModelRefusedError: sites inside one enumeration have different or non-scalar scales.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    sites = trace.nodes
    batch = trace.plate_to_symbol[batch_plate] if batch_plate else None
    ordinals = {
        name: frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
        for name, site in sites.items()
    }
    enumerated = [name for name, site in sites.items() if site["infer"].get("_enumerate_dim") is not None]  # type: ignore[union-attr]
    sum_dims = {dim for name in enumerated for dim in sites[name]["packed"]["log_prob"]._pyro_dims}  # type: ignore[attr-defined]
    sum_dims -= frozenset[str]().union(*ordinals.values())

    total: Tensor | float = 0.0
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    scales: dict[str, float | Tensor] = {}
    for name, site in sites.items():
        terms = site["packed"]
        if name in enumerated:
            # as in Pyro, a mask on the discrete latent itself does not remove its prior
            factor = terms["unscaled_log_prob"]  # type: ignore[typeddict-item]
        elif sum_dims.isdisjoint(terms["log_prob"]._pyro_dims):  # type: ignore[attr-defined]
            total = total + _sum_but(terms["log_prob"], batch)
            continue
        else:
            factor = packed.scale_and_mask(terms["unscaled_log_prob"], mask=terms["mask"])  # type: ignore[typeddict-item]
        factors.setdefault(ordinals[name], []).append(factor)
        scales[name] = site["scale"]
    sizes = {
        dim: size
        for ts in factors.values()
        for t in ts
        for dim, size in zip(t._pyro_dims, t.shape, strict=True)  # type: ignore[attr-defined]
    }  # type: ignore[attr-defined]
    with shared_intermediates() as cache:
        ring = FunctionalLogRing(cache=cache, dim_to_size=sizes)
        target = frozenset({batch}) if batch else frozenset()
        marginal = contract_to_tensor(factors, sum_dims, target_ordinal=target, cache=cache, ring=ring)
    return total + _common_scale(scales) * marginal
