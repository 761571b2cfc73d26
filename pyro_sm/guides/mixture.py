# SPDX-License-Identifier: Apache-2.0
r"""A mixture of Gaussians over the latent space, as an automatic guide.

    ``q(z) = Σ_k π_k N(z; μ_k, L_k L_kᵀ)``

Its draws are not differentiable in ``π``: a component is chosen, and a choice has no derivative. Expectations are:

    ``E_q f = Σ_k π_k E_u f(μ_k + L_k u)``,

so :meth:`AutoGaussianMixture.path_draws` takes draws of every component and carries ``π_k`` as their weight.

Source: "Automatic Differentiation Variational Inference with Mixtures" https://arxiv.org/abs/2003.01687 .
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.util import eye_like
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.nn.module import PyroParam, pyro_method
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_sm.base import Arguments, PathDraws


class AutoGaussianMixture(AutoContinuous):
    """K Gaussians with full covariance over the entire unconstrained latent space, and their probabilities.

    Train it with :class:`~pyro_sm.objectives.FisherDivergence` or
    :class:`~pyro_sm.objectives.MixtureFisherDivergence`, which use its stratified draws. ``Trace_ELBO`` does not know
    them: it falls back on score-function gradients, of high variance.

    Args:
        model: a Pyro model, all of whose latents are continuous.
        num_components: K.
        init_loc_fn: as in Pyro's guides; called anew for every component, so a random one spreads them.
        init_scale: standard deviation of every component at the start.
        init_locs: (K, D) means of the components at the start, in place of ``init_loc_fn``.

    Raises:
        ValueError: a count or scale that is not positive; ``init_locs`` of another shape (at the first call).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_components: int,
        *,
        init_loc_fn: Callable[..., Any] = init_to_sample,
        init_scale: float = 1.0,
        init_locs: Tensor | None = None,
    ) -> None:
        if num_components < 1:
            raise ValueError(f"expected num_components >= 1, found {num_components}")
        if not init_scale > 0:
            raise ValueError(f"expected init_scale > 0, found {init_scale}")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.num_components = num_components
        self._init_scale = init_scale
        self._init_locs = init_locs

    def _start(self, arguments: Arguments) -> Tensor:
        """Means (K, D) of the components before training."""
        first = self._init_loc()
        shape = (self.num_components, self.latent_dim)
        if self._init_locs is not None:
            if self._init_locs.shape != shape:
                raise ValueError(f"expected init_locs of shape {shape}, found {tuple(self._init_locs.shape)}")
            return self._init_locs.detach().clone().to(first)
        rows = [first]
        for _ in range(self.num_components - 1):
            trace = arguments.call(poutine.block(poutine.trace(self.model).get_trace))
            sites = ((n, trace.nodes[n]) for n, _ in self.prototype_trace.iter_stochastic_nodes())
            rows.append(torch.cat([biject_to(s["fn"].support).inv(s["value"]).reshape(-1) for _, s in sites]))
        return torch.stack(rows).detach()

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        locs = self._start(Arguments(args, kwargs))
        self.locs = nn.Parameter(locs)
        self.logits = nn.Parameter(locs.new_zeros(self.num_components))
        self.scales = PyroParam(torch.full_like(locs, self._init_scale), constraints.softplus_positive)
        tril = eye_like(locs, self.latent_dim).expand(self.num_components, -1, -1).clone()
        self.scale_trils = PyroParam(tril, constraints.unit_lower_cholesky)

    @pyro_method
    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log probabilities (K,), means (K, D) and lower-triangular scales (K, D, D)."""
        scales: Any = self.scales
        return self.logits.log_softmax(0), self.locs, scales[..., None] * self.scale_trils

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.MixtureSameFamily:
        """The mixture over the packed latent (D,)."""
        log_probs, locs, trils = self.components()
        gaussians = dist.MultivariateNormal(locs, scale_tril=trils)
        return dist.MixtureSameFamily(dist.Categorical(logits=log_probs), gaussians)

    @pyro_method
    def path_draws(self, noise: Tensor, arguments: Arguments) -> PathDraws:
        """Stratified draws: row i of ``noise`` (N, D) goes to component ``i mod K``, with weight ``π_k / n_k``.

        Raises:
            ValueError: fewer draws than components.
        """
        num_draws = noise.shape[0]
        if num_draws < self.num_components:
            raise ValueError(
                f"expected at least one draw for each of {self.num_components} components, found {num_draws}"
            )
        log_probs, locs, trils = self.components()
        index = torch.arange(num_draws, device=noise.device) % self.num_components
        z = locs[index] + (trils[index] @ noise[..., None])[..., 0]
        counts = torch.bincount(index, minlength=self.num_components)
        return PathDraws(z, arguments.call(self.get_posterior).log_prob(z), (log_probs.exp() / counts)[index])

    @pyro_method
    def latent_log_prob(self, z: Tensor, arguments: Arguments) -> Tensor:
        """``log q`` (N,) of latents (N, D), nats."""
        return arguments.call(self.get_posterior).log_prob(z)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a mixture has no single location and scale: use median(), quantiles() or draws")

    @torch.no_grad()
    def median(self, *args: Any, num_draws: int = 4096, **kwargs: Any) -> dict[str, Tensor]:
        """Elementwise median of guide draws in unconstrained space, as a point of each site's support."""
        middle = self.get_posterior(*args, **kwargs).sample((num_draws,)).median(0).values
        return {site["name"]: biject_to(site["fn"].support)(u) for site, u in self._unpack_latent(middle)}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Iterable[float], *args: Any, num_draws: int = 4096, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Elementwise quantiles of guide draws, by site, shape (len(quantiles), \\*site)."""
        draws = self.get_posterior(*args, **kwargs).sample((num_draws,))
        levels = torch.as_tensor(quantiles).to(draws)
        result: dict[str, list[Tensor]] = {}
        for latent in torch.quantile(draws, levels, dim=0):
            for site, u in self._unpack_latent(latent):
                result.setdefault(site["name"], []).append(biject_to(site["fn"].support)(u))
        return {name: torch.stack(values) for name, values in result.items()}
