# SPDX-License-Identifier: Apache-2.0
r"""A network for particles that knows what does not change their energy: rotation, reflection, and their order.

Mean-free latents ``z`` (D = (n−1)s, see ``mean_free.py``) are positions ``x = H z`` of n particles in R^s. Pairs
``p = {i, j}`` with distance ``d_p`` carry messages, particles carry features, and both move, in L layers:

    ``m_p = silu(W silu((1 + a) ⊙ (E φ(d_p) + U (h_i + h_j)) + b))``,   ``h_i ← h_i + ψ(h_i, Σ_{p∋i} m_p / √n)``,
    ``f_i = Σ_{p={i,j}} (ω·m_p) (x_i − x_j)``,   ``x_i ← x_i + s f_i``,   ``s = r/√(1 + r²)``,

``a, b`` from noise level and context, ``φ`` Gaussian bumps beside ``d`` and ``1/(d + 0.1)``. The vector that comes
out is a sum of vectors that turn with the particles,

    ``v_i = Σ_layers f_i + (g(h_i) + c) x_i``,

with the ``x_i`` as they came, and the log variance one invariant number, the same for all latents. The denoised point
is the noised one plus about ``s v``, so that the particles of each layer stand where the layers before it have
denoised them to: where particles are packed, each has to give way to others that give way themselves, and one look at
the distances does not tell where to. Mean-free by construction: ``F = Hᵀ v``. What it computes is equivariant as long
as the guide's base is isotropic: a common scale for all latents.

Source: "E(n) Equivariant Graph Neural Networks" https://arxiv.org/abs/2102.09844 .
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_sm.nn.mean_free import helmert
from pyro_sm.nn.mlp import NoiseEmbedding, level_features
from pyro_sm.nn.pieces import in_pieces

# Distances, scaled to unit size, that bumps can tell apart: of independent normal points one pair in fifty is farther
# apart in two dimensions, one in twenty in three.
_REACH = 4.0
_SMALLEST = 1e-12  # squared distance of two particles in one place, whose gradient would be NaN
_CONDITION_WIDTH = 32  # twice the frequencies of the level, so that nothing of it is lost
_NOTHING = -30.0  # smaller exponents make subnormal numbers, which slow a matrix product down fifty times
# Messages of so many numbers at a time, two megabytes in float32, stay in the cache of a core.
_NUMBERS_IN_CACHE = 2**19


class EquivariantNetwork(nn.Module):
    """See the head of the file; ``(x (B, D), c (B,) or (1,), context) -> (B, 2D)``.

    Args:
        num_bodies: n.
        space_dim: s.
        width: size of messages and features.
        depth: L.
        num_bumps: of the distance.
        context_dim: C, or 0 for none.
    """

    centres: Tensor
    pairs: Tensor
    joined: Tensor
    helmert: Tensor

    def __init__(
        self, num_bodies: int, space_dim: int, *, width: int, depth: int, num_bumps: int, context_dim: int
    ) -> None:
        super().__init__()
        self.num_bodies, self.space_dim, self.context_dim = num_bodies, space_dim, context_dim
        basis = helmert(num_bodies)
        first, second = torch.combinations(torch.arange(num_bodies)).T
        members = nn.functional.one_hot(first, num_bodies) + nn.functional.one_hot(second, num_bodies)
        # In float64: rounded to float32 they would not be mean-free in a float64 model.
        self.register_buffer("helmert", basis)
        self.register_buffer("pairs", basis[first] - basis[second])  # (P, n−1): differences of positions
        self.register_buffer("joined", members.double())  # (P, n)
        self.register_buffer("centres", torch.linspace(0, _REACH, num_bumps))
        self.embedding = NoiseEmbedding()
        condition = 2 * self.embedding.frequencies.numel() + context_dim
        self.condition = nn.Sequential(nn.Linear(condition, _CONDITION_WIDTH), nn.SiLU())
        self.start = nn.Linear(1, width)
        self.distance = nn.ModuleList(nn.Linear(num_bumps + 2, width) for _ in range(depth))
        self.ends = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.modulation = nn.ModuleList(nn.Linear(_CONDITION_WIDTH, 2 * width) for _ in range(depth))
        self.message = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gather = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.update = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.pull = nn.ModuleList(nn.Linear(width, 1) for _ in range(depth))
        self.radial = nn.Linear(width, 1)
        self.variance = nn.Linear(width, 1)
        self.skip = nn.Linear(_CONDITION_WIDTH, 2)
        for layer in (*self.pull, self.radial, self.variance, self.skip):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, c: Tensor, context: Tensor | None = None) -> Tensor:
        """``F`` and the log variance, (B, 2D), at latents ``x`` (B, D) and noise levels ``c`` (B,) or (1,)."""
        features = level_features(self.embedding, c, context, self.context_dim)
        condition = self.condition(features)
        ratio = torch.exp(4 * c)
        step = (ratio / torch.sqrt(1 + ratio.square()))[:, None, None]
        return in_pieces(self._trunk, x, [condition, step], self.rows_in_cache)

    @property
    def rows_in_cache(self) -> int:
        """Rows whose messages stay in the cache of a core."""
        return max(1, _NUMBERS_IN_CACHE // (self.pairs.shape[0] * self.start.out_features))

    def _trunk(self, x: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """``x`` (B, D) to (B, 2D).

        ``levels``: what is known of level and context, (B, ·), and ``s``, (B, 1, 1); or one row of each.
        """
        condition, step = levels
        z = x.unflatten(-1, (self.num_bodies - 1, self.space_dim))
        pairs, joined, basis = self.pairs.to(x), self.joined.to(x), self.helmert.to(x)
        position = basis @ z
        h = self.start(position.square().sum(-1, keepdim=True))
        force = torch.zeros_like(z)
        silu = nn.functional.silu
        for k, modulation in enumerate(self.modulation):
            difference = pairs @ z
            scale, shift = modulation(condition)[:, None].chunk(2, -1)
            a = self.distance[k](self._seen(difference)) + joined @ self.ends[k](h)
            m = silu(self.message[k](silu(torch.addcmul(shift, a, 1 + scale))))
            own = pairs.T @ (self.pull[k](m) * difference)
            force, z = force + own, z + step * own
            gathered = joined.T @ m / math.sqrt(self.num_bodies)
            h = h + self.update[k](silu(self.gather[k](torch.cat([h, gathered], -1))))
        skip = self.skip(condition)
        centred = basis.T @ ((self.radial(h) + skip[:, None, :1]) * position)
        mean = (force + centred).flatten(-2)
        log_variance = self.variance(h).mean(1) + skip[:, 1:]
        return torch.cat([mean, log_variance.expand_as(mean)], -1)

    def _seen(self, difference: Tensor) -> Tensor:
        """What messages are made of, (B, P, ·), for differences of positions (B, P, s)."""
        d = (difference.square().sum(-1, keepdim=True) + _SMALLEST).sqrt()
        spacing = _REACH / len(self.centres)
        bumps = torch.exp((-0.5 * ((d - self.centres) / spacing).square()).clamp(min=_NOTHING))
        return torch.cat([bumps, d, 1 / (d + 0.1)], -1)


@dataclass(frozen=True)
class EGNN:
    """:class:`EquivariantNetwork` for ``num_bodies`` particles in ``space_dim`` dimensions.

    The model's latents are the mean-free coordinates of :class:`pyro_sm.nn.mean_free.MeanFree`; its base should be
    isotropic, or the sampler is not symmetric (its weights are right all the same).

    Raises:
        ValueError: fewer than two particles, another count that is not positive; at :meth:`build`, latents that are
            not ``(num_bodies − 1)·space_dim`` in number.
    """

    num_bodies: int
    space_dim: int
    width: int = 64
    depth: int = 2
    num_bumps: int = 32

    def __post_init__(self) -> None:
        if self.num_bodies < 2 or min(self.space_dim, self.width, self.depth, self.num_bumps) < 1:
            raise ValueError(f"expected two particles or more and positive counts, found {self}")

    @property
    def isotropic(self) -> bool:
        """Yes: else turning the particles would turn them into others."""
        return True

    def build(self, dim: int, out_dim: int, context_dim: int) -> nn.Module:
        """The network, for ``dim = (num_bodies − 1)·space_dim`` mean-free latents and twice as many outputs."""
        expected = (self.num_bodies - 1) * self.space_dim
        if dim != expected or out_dim != 2 * dim:
            raise ValueError(
                f"{self.num_bodies} particles in {self.space_dim} dimensions have {expected} mean-free latents, "
                f"the model has {dim}: write it in coordinates of MeanFree({self.num_bodies}, {self.space_dim})"
            )
        return EquivariantNetwork(
            self.num_bodies,
            self.space_dim,
            width=self.width,
            depth=self.depth,
            num_bumps=self.num_bumps,
            context_dim=context_dim,
        )
