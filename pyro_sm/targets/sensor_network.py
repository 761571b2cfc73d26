# SPDX-License-Identifier: Apache-2.0
r"""Sensor network localisation: four unknown places from noisy distances, eight configurations.

Places ``x_1 … x_4`` in the plane are unknown (the latents, two coordinates each), ``x_5`` and ``x_6`` known. Of
the 14 pairs with an unknown end, 7 distances were observed, and that the others were not says something too:

    ``w_ij ~ Bernoulli(e^{−u_ij})``,  ``u_ij = d_ij² / 2R²``,  ``y_ij | w_ij = 1 ~ N(d_ij, σ²)``,  ``x ~ N(0, 10²)``,

R = .3, σ = .02; the likelihood of an unobserved pair is ``1 − e^{−u_ij}``. Distances leave reflections open:
``x_1`` and ``x_3`` may each be on either side of the line through the known sensors, and ``x_4`` on either side of
the line from ``x_1`` to ``x_2``: eight configurations.

Source: "A Repelling-Attracting Metropolis Algorithm for Multimodality" https://arxiv.org/abs/1601.05633 .
"""

from __future__ import annotations

import json
import math
from importlib import resources
from itertools import combinations

import torch
from torch import Tensor

from pyro_sm.targets.target import CoveringGaussian, cell_shares

_NUM_UNKNOWN, _NUM_KNOWN = 4, 2


class SensorNetwork:
    """The posterior, unnormalised; ``log_evidence``, ``reference_mean`` and ``reference_sd`` (8,) from a long run of
    importance sampling that proposes the observed distances exactly.

    Args:
        dtype: of the reference, the weights and the start; torch's default if None.
    """

    name = "sensor network"
    dim = 2 * _NUM_UNKNOWN

    def __init__(self, *, dtype: torch.dtype | None = None) -> None:
        content = json.loads(resources.files("pyro_sm.targets").joinpath("data/sensor_network.json").read_text())
        reference = content["reference"]
        self.dtype = dtype or torch.get_default_dtype()
        self.log_evidence: float = reference["log_evidence"]
        self.log_evidence_se: float = reference["log_evidence_se"]
        self.reference_mean = torch.tensor(reference["mean"], dtype=self.dtype)
        self.reference_sd = torch.tensor(reference["sd"], dtype=self.dtype)
        self._weights = torch.tensor(reference["configuration_weights"], dtype=self.dtype)
        self.known = torch.tensor(content["known"], dtype=torch.float64)
        self.range, self.noise, self.prior_sd = content["range"], content["noise"], content["prior_sd"]
        seen = {(i - 1, j - 1): distance for i, j, distance in content["observed"]}
        count = _NUM_UNKNOWN + _NUM_KNOWN
        unseen = [p for p in combinations(range(count), 2) if p not in seen and p[0] < _NUM_UNKNOWN]
        self._seen, self._unseen = torch.tensor(list(seen)), torch.tensor(unseen)
        self._distance = torch.tensor(list(seen.values()), dtype=torch.float64)

    @property
    def start(self) -> CoveringGaussian:
        """N(½, 1): the known sensors are in the unit square."""
        return CoveringGaussian(torch.full((8,), 0.5, dtype=self.dtype), torch.ones(8, dtype=self.dtype))

    def _squares(self, x: Tensor, pairs: Tensor) -> Tensor:
        """``d_ij²`` (..., P) of the pairs (P, 2), for ``x`` (..., 8)."""
        unknown = x.unflatten(-1, (_NUM_UNKNOWN, 2))
        known = self.known.to(x).expand(*unknown.shape[:-2], _NUM_KNOWN, 2)
        places = torch.cat([unknown, known], -2)
        pairs = pairs.to(x.device)
        difference = places.index_select(-2, pairs[:, 0]) - places.index_select(-2, pairs[:, 1])
        # Two sensors in one place have no direction between them: the clamp gives them no force.
        return difference.square().sum(-1).clamp(min=torch.finfo(x.dtype).tiny)

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p̃(x)``, prior times likelihood (...) in nats for ``x`` (..., 8)."""
        prior = -0.5 * (x / self.prior_sd).square() - math.log(self.prior_sd * math.sqrt(2 * math.pi))
        seen, unseen = self._squares(x, self._seen), self._squares(x, self._unseen)
        error = (self._distance.to(x) - seen.sqrt()) / self.noise
        density = -0.5 * error.square() - math.log(self.noise * math.sqrt(2 * math.pi))
        observed = density - seen / (2 * self.range**2)
        missed = torch.log(-torch.expm1(-unseen / (2 * self.range**2)))
        return prior.sum(-1) + observed.sum(-1) + missed.sum(-1)

    def configurations(self, x: Tensor) -> Tensor:
        """Configuration 0 … 7 of draws ``x`` (N, 8), (N,).

        Bits 4 and 2 say that ``x_1`` and ``x_3`` lie left of the line from the first known sensor to the second, bit
        1 that ``x_4`` lies left of that from ``x_1`` to ``x_2``.
        """
        first, second, third, fourth = x.unflatten(-1, (_NUM_UNKNOWN, 2)).unbind(-2)
        start, end = self.known.to(x)
        return 4 * _left(first, start, end) + 2 * _left(third, start, end) + _left(fourth, first, second)

    def mode_weights(self) -> Tensor:
        """Probability of each configuration, (8,), in the order of :meth:`configurations`."""
        return self._weights

    def configuration_shares(self, x: Tensor) -> Tensor:
        """Share of draws ``x`` (N, 8) in each configuration, (8,)."""
        return cell_shares(self.configurations(x), 8, x.dtype)

    def mode_shares(self, x: Tensor) -> Tensor:
        """:meth:`configuration_shares`, by the name that all targets with modes have."""
        return self.configuration_shares(x)


def _left(point: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Whether points (..., 2) lie left of the line from ``start`` to ``end``, as 0 or 1, (...)."""
    line, off = end - start, point - start
    return (line[..., 0] * off[..., 1] - line[..., 1] * off[..., 0] > 0).long()
