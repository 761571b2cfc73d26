# SPDX-License-Identifier: Apache-2.0
r"""Do these draws come from this posterior? A test by the kernel Stein discrepancy, for any source of draws.

MCMC, a guide, or an ArviZ object: whatever gives draws of the model's latents. They are packed into unconstrained
latents ``z`` (N, D) with scores ``s = ∇log p̃(z)``, whitened by the draws' own covariance ``S = LLᵀ``,

    ``y = L⁻¹(z − z̄)``,   ``s_y = Lᵀ s``,

and tested in y, where one length scale suits all directions: ``KSD²`` of ``stein.py`` with a wild bootstrap. The
p-value does not depend on the units or on linear combinations of the latents.

*What it cannot see*: the relative weight of separated modes, since scores do not know it: draws that sit in
one of two modes pass. Use the weights of a guide (``to_arviz``) for that.

A Markov chain's draws resemble their neighbours, and a test that takes them for independent rejects good chains.
So only every τ-th draw is kept, rounded, τ the integrated autocorrelation time ``1 + 2Σρ_k`` of the slowest component
of latents and scores, and what correlation remains, τ', goes into the bootstrap: its signs flip from draw to draw
with probability ``1/(2τ')``, ½ for independent draws. (Signs alone, without thinning, need far more draws until the
test has its size.) Chains are laid end to end.

Sources: "A Kernel Test of Goodness of Fit" https://arxiv.org/abs/1602.02964 ; "Measuring Sample Quality with
Kernels" https://arxiv.org/abs/1703.01717 .
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_sm.diagnostics.guide_draws import draw_from_guide
from pyro_sm.model.density import ModelDensity
from pyro_sm.stein import IMQ, RadialKernel, stein_test

_CHUNK = 4096
"""Draws scored at a time, to bound the memory of the model's graph."""

_FEWEST = 10
"""Draws below which nothing is tested: ten signs have 2⁹ patterns up to a common one, and p resolves to .002."""

_SIGNIFICANT = 0.05
"""p-value below which the words say "evidence": the convention, and no decision; the value stands beside it."""

_ON_A_LINE = 1e-12
"""Of the largest variance: directions with less are rounding in float64, and have no scale of their own."""

_BLIND = "It does not see the relative weight of separated modes."


class GoodnessOfFit(NamedTuple):
    """Whether draws fit a posterior; :meth:`__str__` says it in words.

    ``p_value``: small means a bad fit. ``u``, ``v``: unbiased and non-negative estimates of ``KSD²``, in whitened
    space (no unit) or, unwhitened, per squared unconstrained unit. ``num_draws``: N used. ``flip``: probability with
    which the bootstrap's signs changed. ``kernel``: with its length scale.
    """

    p_value: float
    u: float
    v: float
    num_draws: int
    flip: float
    kernel: RadialKernel

    def __str__(self) -> str:
        verdict = (
            "evidence that they do not come from this posterior"
            if self.p_value < _SIGNIFICANT
            else "no evidence that they do not come from this posterior"
        )
        return (
            f"Kernel Stein test of {self.num_draws} draws: p = {self.p_value:.3g}, {verdict} "
            f"(KSD² {self.u:.3g} unbiased, {self.v:.3g} non-negative). {_BLIND}"
        )


def stein_goodness_of_fit(
    model: Callable[..., Any],
    source: Any,
    *args: Any,
    kernel: RadialKernel | None = None,
    num_draws: int = 1000,
    whiten: bool = True,
    flip: float | None = None,
    num_bootstrap: int = 500,
    **kwargs: Any,
) -> GoodnessOfFit:
    """Test whether draws come from the posterior of ``model``, by the kernel Stein discrepancy; see the head.

    Args:
        model: the Pyro model.
        source: a mapping from latent sites to draws (chains, draws, \\*site), as
            ``MCMC.get_samples(group_by_chain=True)`` gives them; an ArviZ ``InferenceData`` or ``DataTree`` with a
            ``posterior``; or a guide, which is then drawn from (its raw draws, without weights).
        *args: what the model is called with.
        kernel: by default ``IMQ()`` with the median distance.
        num_draws: of the guide; of longer chains every k-th draw is kept, so that about this many remain.
        whiten: measure in units of the draws' covariance; ``False``: in unconstrained units as they are.
        flip: probability that the bootstrap's sign changes from draw to draw, in (0, ½]. By default found as at the
            head, with chains thinned; ½ for a guide. Given, no draw is left out for its correlation.
        num_bootstrap: resamples; the p-value is at least ``1/(num_bootstrap + 1)``.
        **kwargs: what the model is called with, by name.

    Raises:
        ValueError: a latent site is missing or of the wrong shape; fewer than ten draws; draws or scores are not
            finite; ``flip`` outside (0, ½] or ``num_bootstrap`` < 1.
        TypeError: ``source`` is none of these, or a guide without a density.
        ModelRefusedError: the model cannot be evaluated in batches.
    """
    if num_draws < _FEWEST:
        raise ValueError(f"expected num_draws >= {_FEWEST}, found {num_draws}")
    density = ModelDensity(model, args, kwargs)
    values = _site_values(source, density)
    if values is None:
        chains = draw_from_guide(source, density, num_draws, args, kwargs).z[None]
    else:
        chains = _packed(values, density)
        chains = chains[:, :: max(1, math.ceil(chains.shape[0] * chains.shape[1] / num_draws))]
    z, score = _scored(chains, density)
    if values is not None and flip is None:
        step = round(_slowest(z, score))
        z, score = z[:, ::step], score[:, ::step]
        flip = 0.5 / _slowest(z, score)
    z, score = z.reshape(-1, density.dim), score.reshape(-1, density.dim)
    if len(z) < _FEWEST:
        raise ValueError(f"expected at least ten draws, found {len(z)} (less correlated ones, of a Markov chain)")
    if whiten:
        z, score = _whitened(z, score)
    flip = 0.5 if flip is None else flip
    found = stein_test(z, score, kernel or IMQ(), num_bootstrap=num_bootstrap, flip=flip)
    return GoodnessOfFit(found.p_value, found.u, found.v, len(z), flip, found.kernel)


def stein_p_value(density: ModelDensity, z: Tensor) -> float:
    """p-value of the test, with its defaults, for independent latents (N, D), N ≥ 10; one gradient each."""
    chains, score = _scored(z[None], density)
    return stein_test(*_whitened(chains[0], score[0]), IMQ()).p_value


def _site_values(source: Any, density: ModelDensity) -> Mapping[str, Tensor] | None:
    """Draws (chains, draws, \\*site) by site, or ``None`` if ``source`` has to be drawn from."""
    if isinstance(source, Mapping) and not hasattr(source, "posterior"):  # a DataTree is a mapping too
        return {name: torch.as_tensor(value).detach() for name, value in source.items()}
    posterior = getattr(source, "posterior", None)
    if posterior is None or not hasattr(posterior, "data_vars"):
        if not callable(source) and not hasattr(source, "draw_weighted"):
            raise TypeError(
                f"expected draws by site, an ArviZ object with a posterior, or a guide, found {type(source).__name__}"
            )
        return None
    values = {}
    for site in density.sites:
        name = site.name.replace("/", ".")  # as the export writes it
        if name in posterior.data_vars:
            array = posterior[name].transpose("chain", "draw", ...).values
            values[site.name] = torch.as_tensor(array.copy())
    return values


def _packed(values: Mapping[str, Tensor], density: ModelDensity) -> Tensor:
    """Unconstrained draws (chains, draws, D)."""
    missing = [site.name for site in density.sites if site.name not in values]
    if missing:
        raise ValueError(f"expected draws of every latent site, found none of {', '.join(missing)}")
    lengths: set[tuple[int, ...]] = set()
    flat = {}
    for site in density.sites:
        value = values[site.name].to(device=density.device)
        if value.ndim != 2 + len(site.shape) or value.shape[2:] != site.shape:
            raise ValueError(
                f"site {site.name!r}: expected draws of shape (chains, draws, *{tuple(site.shape)}), found "
                f"{tuple(value.shape)}; take them with get_samples(group_by_chain=True), or add a first dimension"
            )
        lengths.add(tuple(value.shape[:2]))
        flat[site.name] = value.to(density.dtype).reshape(-1, *site.shape)
    if len(lengths) > 1:
        raise ValueError(f"expected as many chains and draws of every site, found {sorted(lengths)}")
    chains, draws = lengths.pop()
    return density.pack(flat).reshape(chains, draws, density.dim)


def _scored(chains: Tensor, density: ModelDensity) -> tuple[Tensor, Tensor]:
    """The draws and their scores (chains, draws, D), float64."""
    flat = chains.reshape(-1, density.dim)
    parts = [density.log_prob_and_score(part)[1] for part in flat.split(_CHUNK)]
    score = torch.cat(parts) if parts else flat
    if not bool(torch.isfinite(flat).all() and torch.isfinite(score).all()):
        raise ValueError("expected finite draws and scores: some draws lie outside the support of the model")
    return chains.double(), score.reshape(chains.shape).double()


def _slowest(z: Tensor, score: Tensor) -> float:
    return autocorrelation_time(torch.cat([z, score], -1))


def _whitened(z: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    centred = z - z.mean(0)
    covariance = centred.T @ centred / len(z)
    eigenvalue, eigenvector = torch.linalg.eigh(covariance)
    # Fewer draws than latents, or draws on a line, leave directions without a scale: they get the smallest there is.
    floor = eigenvalue[eigenvalue > _ON_A_LINE * eigenvalue.max()].min()
    root = eigenvector * eigenvalue.clamp(min=floor).sqrt()
    return centred @ (eigenvector / eigenvalue.clamp(min=floor).sqrt()), score @ root


def autocorrelation_time(chains: Tensor) -> float:
    """The largest ``τ = 1 + 2 Σ ρ_k`` over the components of ``chains`` (M, T, K), at least 1, in draws.

    Summed over pairs of lags while a pair is positive and no larger than the one before (Geyer's initial monotone
    sequence), correlations averaged over the M chains.
    """
    length = chains.shape[1]
    if length < 4:
        return 1.0
    centred = chains - chains.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * length, dim=1).abs().square()
    covariance = torch.fft.irfft(spectrum, n=2 * length, dim=1)[:, :length].mean(0)
    rho = covariance / covariance[0].clamp(min=torch.finfo(covariance.dtype).tiny)
    even = length - length % 2
    pairs = rho[:even:2] + rho[1:even:2]
    pairs = torch.where((pairs > 0).to(torch.int64).cumprod(0).bool(), pairs, 0.0)
    time = 2 * torch.cummin(pairs, 0).values.sum(0) - 1
    return max(1.0, float(time.max()))
