# SPDX-License-Identifier: Apache-2.0
r"""A diffusion sampler in latent space: Gaussian base, denoiser and kernels together, in plain torch.

Latents ``z = m + L u`` are whitened by the base ``N(m, L Lᵀ)``; everything else happens in ``u``. Where latents drive
the scales of others, a coupling bends what the base gives: ``z = T(m + L u)`` (``coupling.py``). Log ratios
and densities are handed out for ``z``, so ``log|det ∂z/∂u|`` is already in them: ``log w = log p̃(z) + R``.

A sampler is a value. What training changes beside the network is fitted to weighted draws by methods that return
another one (:meth:`Diffusion.refitted`, :meth:`Diffusion.moved_to`, :meth:`Diffusion.noncentred`); whoever holds
the parameters takes it over.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_sm.diffusion.anchor import fit_anchor
from pyro_sm.diffusion.coupling import Coupling
from pyro_sm.diffusion.coupling_fit import entropy, fit_coupling, refit_coupling
from pyro_sm.diffusion.denoiser import Denoiser, Regression
from pyro_sm.diffusion.flow import FlowSolver, ProbabilityFlow
from pyro_sm.diffusion.kernels import Kernels, fit_kernels, gaussian_kernels, path_log_ratio, sample_paths
from pyro_sm.diffusion.levels import fit_levels
from pyro_sm.diffusion.tails import HeavyTails
from pyro_sm.gaussians.gaussian import fits, moments_of

_LEVEL_DRAWS = 1024  # levels need fewer than moments do, and look at many more places
_LEVEL_NUMBERS = 65_536  # and fewer yet of many latents: their costs are added up
_ROUND_NUMBERS = 32_768  # that one variance for all latents rests on
_ROUND_LEVEL_NUMBERS = 8_192  # and the choice of levels, where all latents are alike

# Nats per draw that a coupling must save to take the place of one with the same drivers, and of one with others. The
# first is several times the noise of some thousand draws; the second has to be worth another beginning.
_BETTER_COUPLING, _OTHER_COUPLING = 0.1, 0.5
_LOOKED_AT = 8  # points at which an untrained network is zero: one would do, but for a zero by chance
_COVERING_DRAWS = 8192
_FAR = 1e12  # in whitened space; of its square float32 still makes sums


@dataclass(frozen=True)
class Diffusion:
    """What a diffusion guide is, once Pyro is taken away. Satisfies ``pyro_sm.base.DiffusionProcess``.

    Args:
        denoiser: network and preconditioning, in whitened space.
        kernels: levels and fitted covariances, in whitened space.
        base_loc: (D,) ``m``.
        base_scale_tril: (D, D) ``L``, lower triangular.
        solver: for :meth:`log_prob`.
        heavy: tails of the kernels that paths are drawn with; None for Gaussian ones.
        coupling: ``T``; None for the identity.
        isotropic: whether the network is the same in all directions, so that the base has to stay round.
        begins_anew: whether the network has to begin anew, since coordinates have become others than it has learned.
    """

    denoiser: Denoiser
    kernels: Kernels
    base_loc: Tensor
    base_scale_tril: Tensor
    solver: FlowSolver = field(default_factory=FlowSolver)
    heavy: HeavyTails | None = None
    coupling: Coupling | None = None
    isotropic: bool = False
    begins_anew: bool = False

    @property
    def dim(self) -> int:
        """D, the number of latents."""
        return self.base_loc.shape[0]

    @property
    def ratios(self) -> Tensor:
        """Noise-to-signal ratios of the kernels, (K+1,), the first of them 0."""
        return self.kernels.ratios

    def _noncentred(self, u: Tensor) -> Tensor:
        """``m + L u``; (..., D) to (..., D)."""
        return self.base_loc + u @ self.base_scale_tril.T

    def log_det(self, u: Tensor) -> Tensor:
        """``log|det ∂z/∂u|`` (B,) at whitened points ``u`` (B, D), in nats."""
        constant = self.base_scale_tril.diagonal().abs().log().sum()
        if self.coupling is None:
            return constant.expand(u.shape[0])
        return constant + self.coupling.log_det(self._noncentred(u))

    def to_latent(self, u: Tensor) -> Tensor:
        """``T(m + L u)``; (..., D) to (..., D)."""
        noncentred = self._noncentred(u)
        return noncentred if self.coupling is None else self.coupling.to_centred(noncentred)

    def to_white(self, z: Tensor) -> Tensor:
        """``L⁻¹ (T⁻¹(z) − m)``; (B, D) to (B, D)."""
        noncentred = z if self.coupling is None else self.coupling.to_noncentred(z)
        u = torch.linalg.solve_triangular(self.base_scale_tril, (noncentred - self.base_loc).T, upper=False).T
        # Deep in the neck of a funnel, where a wide prior may draw, a latent's own scale underflows: far is far.
        return u if self.coupling is None else torch.nan_to_num(u, nan=0.0).clamp(-_FAR, _FAR)

    def is_round(self) -> bool:
        """Whether the base is centred, and the same in all directions."""
        scale = torch.eye(self.dim).to(self.base_scale_tril) * self.base_scale_tril[0, 0]
        return self.coupling is None and not bool(self.base_loc.any()) and torch.equal(scale, self.base_scale_tril)

    def covering_gaussian(self) -> tuple[Tensor, Tensor]:
        """Location (D,) and scale (D, D), lower triangular, of the base; bent, of the normal law with its moments."""
        if self.coupling is None:
            return self.base_loc, self.base_scale_tril
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(_COVERING_DRAWS, self.dim, generator=generator, dtype=torch.float64)
        z = self.to_latent(noise.to(self.base_loc)).double()
        tril = torch.linalg.cholesky(torch.atleast_2d(torch.cov(z.T)))
        return z.mean(0).to(self.base_loc), tril.to(self.base_loc)

    def _noise(self, levels: int, num_draws: int) -> Tensor:
        return torch.randn(levels, num_draws, self.dim, dtype=self.base_loc.dtype, device=self.base_loc.device)

    def draw(self, num_draws: int) -> tuple[Tensor, Tensor]:
        """Draws ``z`` (N, D) and their path log ratio ``R`` (N,): ``E[exp(log p̃(z) + R)] = Z``."""
        noise = self._noise(len(self.ratios), num_draws)
        if self.heavy is not None:
            noise = self.heavy.inflated(noise)
        u, log_ratio = sample_paths(self.denoiser, self.kernels, noise, self.heavy)
        return self.to_latent(u), log_ratio + self.log_det(u)

    def path_log_ratio(self, z: Tensor) -> Tensor:
        """``R`` (N,) of a forward-noised path from each given latent ``z`` (N, D)."""
        noise = self._noise(len(self.ratios) - 1, z.shape[0])
        u = self.to_white(z)
        return path_log_ratio(self.denoiser, self.kernels, u, noise, self.heavy) + self.log_det(u)

    def fit(self, z: Tensor, *, isotropic: bool = False) -> Kernels:
        """Kernels refitted to equally weighted latents ``z`` (N, D), in random order: levels first, then moments.

        ``isotropic``: the target, whitened, and the network are the same in all directions, and centred: one moment
        for all latents, which fewer draws are enough for.
        """
        u = self.to_white(z)
        if isotropic:
            u = u[: max(_ROUND_NUMBERS // self.dim, 1)]
        noise = torch.randn_like(u)
        numbers = _ROUND_LEVEL_NUMBERS if isotropic else _LEVEL_NUMBERS
        some = slice(min(_LEVEL_DRAWS, max(numbers // self.dim, 1)))
        ratios = fit_levels(self.denoiser, self.kernels.ratios, u[some], noise[some])
        return fit_kernels(self.denoiser, self.kernels._replace(ratios=ratios), u, noise, isotropic=isotropic)

    def white_score(self, u: Tensor, score: Tensor) -> Tensor:
        """``∇_u [log p(z(u)) + log|det ∂z/∂u|]`` (B, D) at ``u`` (B, D), from ``score = ∇_z log p`` (B, D)."""
        if self.coupling is not None:
            score = self.coupling.noncentred_score(self._noncentred(u), score)
        return score @ self.base_scale_tril

    def regression(self, target_mean: Tensor, y: Tensor, r: Tensor) -> Regression:
        """The denoiser's error against a target for the clean point; whitened, (B, D), (B, D) and (B,)."""
        return self.denoiser.regression(target_mean, y, r)

    def flow(self) -> ProbabilityFlow:
        """The probability flow, in whitened space."""
        return ProbabilityFlow(self.denoiser, self.kernels, self.solver)

    def log_prob(self, z: Tensor) -> Tensor:
        """``log q(z)`` (B,) in nats, by the probability flow; ``z``: (B, D)."""
        u = self.to_white(z)
        return self.flow().log_prob(u) - self.log_det(u)

    # -- fitted to draws ---------------------------------------------------------------------------------------

    def is_trained(self, z: Tensor) -> bool:
        """Whether the network says anything at latents ``z`` (N, D): before training it is zero everywhere."""
        level = torch.zeros(1, dtype=z.dtype, device=z.device)
        return bool((self.denoiser.network(z[:_LOOKED_AT], level, self.denoiser.context) != 0).any())

    def refitted(self, z: Tensor) -> Diffusion:
        """With levels, variance factors and start refitted to equally weighted latents ``z`` (N, D)."""
        return replace(self, kernels=self.fit(z, isotropic=self.isotropic and self.is_round()))

    def moved_to(self, z: Tensor, group: Tensor | None = None) -> Diffusion:
        """With a base that has the moments of equally weighted latents ``z`` (N, D); for a network that has not
        learned.

        A base that is good enough for them stays. Where they show a funnel, it is non-centred first
        (:meth:`noncentred`). Else, with a ``group`` (N,) for each of them, a mixture of normal laws at the groups
        becomes the anchor. The network's input and output are relative to all of these: what it has learned would
        mean something else.
        """
        coupling = fit_coupling(z) if self._may_couple() else None
        moved = self
        if coupling is not None or not fits(self.to_white(z)):
            moved = self._on_base_of(z, coupling)
        # A funnel has as many modes as its neck has corners, and they mean nothing.
        anchored = group is not None and coupling is None and not self.isotropic
        anchor = fit_anchor(moved.to_white(z), group) if anchored and group is not None else None
        return replace(moved, denoiser=replace(moved.denoiser, anchor=anchor))

    def noncentred(self, z: Tensor, *, begin: bool = True) -> Diffusion | None:
        """Non-centred, where equally weighted latents ``z`` (N, D) show a funnel, or None.

        They show one where some of them drive the scales of others (:mod:`pyro_sm.diffusion.coupling`), by so much
        that a Gaussian loses half a nat a draw by it. What the network has learned is then lost: it was about other
        coordinates. A coupling that is in use follows the draws; the network is then kept, being nearly right.

        Args:
            z: the latents.
            begin: whether to do so where no coupling is in use, or one with other drivers.

        Returns:
            None where nothing is worth a change.
        """
        held = self.coupling
        if not self._may_couple() or self.denoiser.anchor is not None or (held is None and not begin):
            return None
        found = fit_coupling(z) if begin else None
        if held is not None:
            followed = refit_coupling(z, held)
            if found is None or not entropy(z, found) < entropy(z, followed) - _OTHER_COUPLING:
                return self._followed(z, held, followed)
        return None if found is None else replace(self._on_base_of(z, found), begins_anew=True)

    def _may_couple(self) -> bool:
        """Not where a base has to be round, nor where one network serves many data sets: each has its own funnel."""
        return not self.isotropic and self.denoiser.context is None

    def _followed(self, z: Tensor, held: Coupling, followed: Coupling) -> Diffusion | None:
        """With the coupling that has ``followed`` the draws, if it is better; the base stays, if it fits."""
        if not entropy(z, followed) < entropy(z, held) - _BETTER_COUPLING:
            return None
        process = replace(self, coupling=followed)
        return process if fits(process.to_white(z)) else self._on_base_of(z, followed)

    def _on_base_of(self, z: Tensor, coupling: Coupling | None) -> Diffusion:
        """With the base at the moments of latents ``z`` (N, D), non-centred; kernels as at first."""
        noncentred = z if coupling is None else coupling.to_noncentred(z)
        loc, scale_tril = moments_of(noncentred, isotropic=self.isotropic)
        kernels = gaussian_kernels(self.ratios, len(loc))
        return replace(self, base_loc=loc, base_scale_tril=scale_tril, kernels=kernels, coupling=coupling)
