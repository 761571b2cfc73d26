# SPDX-License-Identifier: Apache-2.0
r"""Distributions as functions of Gaussian noise: ``u ~ N(0, I)``, ``x = F(u)``, ``log q(x)``.

Pyro's distributions draw their noise themselves and keep it to themselves; a divergence measured in the noise's own
space needs it as an argument. :func:`push` does with given noise what ``rsample`` does with its own, and returns the
log density by the forward map, so that no transform is ever inverted.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Size, Tensor
from torch.distributions import Independent, TransformedDistribution


class NoGaussianNoiseError(TypeError):
    """A distribution whose draws are no known function of Gaussian noise."""


def noise_shape(fn: Any) -> Size:
    """Shape of the noise behind one draw of ``fn``; its last dimension may be longer than that of the draw.

    Raises:
        NoGaussianNoiseError: there is none.
    """
    if isinstance(fn, Independent | dist.MaskedDistribution):
        return noise_shape(fn.base_dist)
    if isinstance(fn, dist.ExpandedDistribution):
        inner = noise_shape(fn.base_dist)
        event = len(inner) - len(fn.base_dist.batch_shape)
        return fn.batch_shape + inner[len(inner) - event :]
    if isinstance(fn, TransformedDistribution):
        return noise_shape(fn.base_dist)
    if isinstance(fn, torch.distributions.LowRankMultivariateNormal):
        return fn.batch_shape + Size((fn.event_shape[0] + fn.cov_factor.shape[-1],))
    if isinstance(fn, torch.distributions.Normal | torch.distributions.MultivariateNormal):
        return fn.batch_shape + fn.event_shape
    if fn.event_shape == () and fn.has_rsample and type(fn).icdf is not torch.distributions.Distribution.icdf:
        return Size(fn.batch_shape)
    raise NoGaussianNoiseError(type(fn).__name__)


def push(fn: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    """``x = F(u)`` and ``log q(x)``.

    ``noise``: (\\*S, \\*noise_shape(fn)); returns (\\*S, \\*fn.shape()) and (\\*S, \\*fn.batch_shape), nats.

    Raises:
        NoGaussianNoiseError: draws of ``fn`` are no known function of Gaussian noise.
    """
    if isinstance(fn, dist.MaskedDistribution | dist.ExpandedDistribution):
        value, _ = push(fn.base_dist, noise)
        return value, fn.log_prob(value)
    if isinstance(fn, Independent):
        value, log_q = push(fn.base_dist, noise)
        return value, sum_rightmost(log_q, fn.reinterpreted_batch_ndims)
    if isinstance(fn, TransformedDistribution):
        return _push_transformed(fn, noise)
    if isinstance(fn, torch.distributions.LowRankMultivariateNormal):
        dim = fn.event_shape[0]
        shared, own = noise[..., dim:], noise[..., :dim]
        value = fn.loc + (fn._unbroadcasted_cov_factor @ shared[..., None])[..., 0]
        value = value + fn._unbroadcasted_cov_diag.sqrt() * own
        return value, fn.log_prob(value)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        value = fn.loc + (fn._unbroadcasted_scale_tril @ noise[..., None])[..., 0]
        return value, fn.log_prob(value)
    if isinstance(fn, torch.distributions.Normal):
        value = fn.loc + fn.scale * noise
        return value, fn.log_prob(value)
    noise_shape(fn)
    value = fn.icdf(torch.special.ndtr(noise))
    return value, fn.log_prob(value)


def _push_transformed(fn: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    start, base_log_q = push(fn.base_dist, noise)
    values = [start]
    for transform in fn.transforms:
        values.append(transform(values[-1]))
    event_dim, log_det = len(fn.event_shape), torch.zeros((), dtype=start.dtype, device=start.device)
    for i in reversed(range(len(fn.transforms))):
        transform = fn.transforms[i]
        event_dim += transform.domain.event_dim - transform.codomain.event_dim
        step = transform.log_abs_det_jacobian(values[i], values[i + 1])
        log_det = log_det + sum_rightmost(step, event_dim - transform.domain.event_dim)
    return values[-1], sum_rightmost(base_log_q, event_dim - len(fn.base_dist.event_shape)) - log_det
