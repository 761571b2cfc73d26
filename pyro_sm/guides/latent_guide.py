# SPDX-License-Identifier: Apache-2.0
"""An automatic guide over the packed latent: its model and sites, and what Pyro asks of a guide's posterior.

Pyro's ``AutoContinuous`` serves Gaussians, whose moments are known. Here are the same promises for a guide that can
only draw: values by site with the bijections that ``ModelDensity`` uses, medians and quantiles from draws, copies
that leave the live guide's model alone, and the model's batched density, kept while model and data stay the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_sm.base import Arguments
from pyro_sm.diffusion.diffusion import Diffusion
from pyro_sm.guides.posterior import DiffusionPosterior, FlowTransform
from pyro_sm.guides.prototype import check_sites, trace_prototype
from pyro_sm.model.cache import Cache, bound_density
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.transforms import bijection_onto

_NOTHING = Arguments()


class LatentGuide(AutoContinuous):
    """A guide whose posterior is a diffusion sampler, which the subclass makes from its parameters.

    Args:
        model: a Pyro model.
        init_loc_fn: as in Pyro's guides; used for the prototype trace only.
        create_plates: as in ``AutoNormal``.
        name: prefix of the names in the param store; the class name if None.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc_fn: Callable[..., Any],
        create_plates: Callable[..., Any] | None,
        name: str | None,
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.create_plates = create_plates
        self._pyro_name = name or type(self).__name__
        self._raw_model: tuple[Callable[..., Any]] | None = (model,)
        self._cached_densities: Cache = ()

    context: Callable[..., Tensor] | None = None

    def diffusion(self, arguments: Arguments = _NOTHING) -> Diffusion:
        """The sampler behind the guide, in plain torch, with the current parameters."""
        raise NotImplementedError

    # -- the model ---------------------------------------------------------------------------------------------

    def _trace_prototype(self, arguments: Arguments) -> None:
        whole = self.create_plates is None
        prototype = trace_prototype(self.model, self._prototype_hide_fn, arguments, whole_plates=whole)
        if self.master is not None:
            self.master()._check_prototype(prototype.trace)
        self.prototype_trace = prototype.trace
        self._prototype_frames = prototype.frames
        self._cond_indep_stacks = prototype.stacks
        self._unconstrained_shapes = prototype.shapes
        self.latent_dim = sum(shape.numel() for shape in prototype.shapes.values())
        with poutine.block():  # NeuTraReparam asks for them, and score matching never calls the guide
            arguments.call(self._create_plates)

    def _model_for_density(self, arguments: Arguments) -> Callable[..., Any]:
        if self._raw_model is None:
            raise ValueError("this guide was unpickled without its model: set it with guide.attach(model)")
        model = self._raw_model[0]
        if self.master is None:
            return model
        # A part of an AutoGuideList: its blocked model draws the other parts' sites afresh in every run, so its
        # density is random. They are held at the values of the list's prototype.
        own = arguments.call(poutine.block(poutine.trace(poutine.block(model, self._prototype_hide_fn)).get_trace))
        whole = self.master().prototype_trace
        held = {name: site["value"] for name, site in whole.iter_stochastic_nodes() if name not in own.nodes}
        return poutine.condition(self.master().model, data=held)

    def attach(self, model: Callable[..., Any]) -> None:
        """Give an unpickled guide its model back (models are not pickled, as in Pyro)."""
        self._raw_model = (model,)
        self._model = (model,)

    def _density(self, model: Callable[..., Any], arguments: Arguments) -> ModelDensity:
        density, cache = bound_density(self._cached_densities, model, arguments)
        if cache is not self._cached_densities:
            if self.prototype_trace is not None:
                check_sites(self._unconstrained_shapes, density.sites)
            self._cached_densities = cache
        return density

    def inspect(self, model: Callable[..., Any], arguments: Arguments) -> None:
        """Make the density of ``model`` on this data, as :meth:`bind` will need it, and no parameters.

        Raises:
            ModelRefusedError: the model cannot be evaluated in batches, or the data change its latents.
        """
        self._density(model, arguments)

    # -- the posterior -----------------------------------------------------------------------------------------

    def get_posterior(self, *args: Any, **kwargs: Any) -> DiffusionPosterior:
        """The posterior over the packed latent (D,): reparametrised draws, and their log density."""
        return DiffusionPosterior(self.diffusion(Arguments(args, kwargs)))

    def get_base_dist(self) -> dist.TorchDistribution:
        """``N(m_T, s_T²)/(1+r_K²)``: what the probability flow starts from (for ``NeuTraReparam``)."""
        loc, scale = self.diffusion().flow().base()
        return dist.Normal(loc, scale).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """The probability flow from :meth:`get_base_dist` to latent space.

        Raises:
            NotImplementedError: the guide has a context, and no arguments are given.
        """
        if self.context is not None and not args and not kwargs:
            raise NotImplementedError("a guide with a context has no transform that is free of the data")
        return FlowTransform(self.diffusion(Arguments(args, kwargs)))

    # -- draws by site -----------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all sites; as ``AutoContinuous.forward``, with the bijections that ``ModelDensity`` uses.

        Torch's own registry has none onto positive-definite matrices or their Cholesky factors.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for site, unconstrained in self._unpack_latent(latent):
            name, event_dim = site["name"], site["fn"].event_dim
            transform = bijection_onto(site["fn"].support)
            value = transform(unconstrained)
            log_density: Tensor | float = 0.0
            if poutine.get_mask() is not False:
                pointwise = -transform.log_abs_det_jacobian(unconstrained, value)
                log_density = sum_rightmost(pointwise, pointwise.dim() - value.dim() + event_dim)
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[name]:
                    stack.enter_context(plates[frame.name])
                result[name] = pyro.sample(name, dist.Delta(value, log_density=log_density, event_dim=event_dim))
        return result

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} is not Gaussian: use median(), quantiles() or draws")

    def _draw_set_up(self, num_draws: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Unweighted latents (num_draws, D), of a guide that is set up if it was not."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self.diffusion(Arguments(args, kwargs)).draw(num_draws)[0]

    def _by_site(self, z: Tensor) -> dict[str, Tensor]:
        """Constrained values (N, \\*shape) of latents ``z`` (N, D)."""
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        pieces = z.split([shape.numel() for shape in self._unconstrained_shapes.values()], -1)
        return {
            name: bijection_onto(sites[name]["fn"].support)(piece.reshape(len(z), *shape))
            for (name, shape), piece in zip(self._unconstrained_shapes.items(), pieces, strict=True)
        }

    @torch.no_grad()
    def median(self, *args: Any, num_draws: int = 4096, **kwargs: Any) -> dict[str, Tensor]:
        """Median of guide draws in unconstrained space, as a point of each site's support; unweighted."""
        middle = self._draw_set_up(num_draws, args, kwargs).median(0).values
        return {name: value[0] for name, value in self._by_site(middle[None]).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Iterable[float], *args: Any, num_draws: int = 4096, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Elementwise quantiles of guide draws, by site, shape (len(quantiles), \\*site); unweighted."""
        values = self._by_site(self._draw_set_up(num_draws, args, kwargs))
        levels = torch.as_tensor(quantiles)
        return {name: torch.quantile(x, levels.to(x), dim=0) for name, x in values.items()}

    # -- copying -----------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own version clears the model of the *live* guide; here only the copy loses it.
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        state = self.__dict__.copy()
        state |= {"_model": None, "_raw_model": None, "master": None, "_cached_densities": ()}
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentGuide:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._model, new._raw_model = self._model, self._raw_model
        return new
