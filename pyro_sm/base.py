# SPDX-License-Identifier: Apache-2.0
r"""The contracts between the layers, and the value types that cross them. Read this page first.

Symbols used in every file of the package:

* ``z`` in R^D — the *latent*: all continuous latent sites of a model, unconstrained, packed into one vector.
* ``log p̃(z) = log p(z) + log Z`` — the *density*: unnormalised, in nats. ``Z`` is the *evidence*.
* ``∇ log p̃(z)`` — its *score*, shape ``(B, D)`` for a batch of B latents.
* ``q`` — the *guide*; a draw from it is a path ``x_K → … → x_0 = z`` of a diffusion.
* ``log w = log p̃(z) − log q`` — the *log weight*: with the path's own density in the place of ``q``,
  ``E[w] = Z`` still holds exactly.

Objectives and guides never import each other. An objective asks for a capability (a protocol below);
:func:`require` turns a mismatch into one error that names objective, guide and the missing capability.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class PyroSMWarning(UserWarning):
    """Every warning of this package; filter on it to see (or silence) ours alone."""


class ModelRefusedError(ValueError):
    """The model cannot be turned into a batched density; the message names the site and the reason."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another model; the message says which."""


@dataclass(frozen=True)
class Arguments:
    """What a model, and so its guide, is called with: one value in the place of two.

    ``args`` by position, ``kwargs`` by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def call(self, function: Callable[..., Any]) -> Any:
        """``function(*args, **kwargs)``."""
        return function(*self.args, **self.kwargs)

    @property
    def values(self) -> tuple[Any, ...]:
        """All of them, in order."""
        return (*self.args, *self.kwargs.values())


@dataclass
class Evaluations:
    """How many latents were pushed through the user's model.

    ``values`` counts values of ``log p̃``; ``scores`` counts its gradients (each comes with a value, counted too).
    ``not_a_number`` counts values that were NaN, and were read as ``-inf``.
    """

    values: int = 0
    scores: int = 0
    not_a_number: int = 0

    def __add__(self, other: Evaluations) -> Evaluations:
        """Both."""
        return Evaluations(
            self.values + other.values,
            self.scores + other.scores,
            self.not_a_number + other.not_a_number,
        )

    def __sub__(self, earlier: Evaluations) -> Evaluations:
        """What came after an ``earlier`` count."""
        return Evaluations(
            self.values - earlier.values,
            self.scores - earlier.scores,
            self.not_a_number - earlier.not_a_number,
        )


@runtime_checkable
class Density(Protocol):
    """An unnormalised log density on R^D, evaluated in batches."""

    dim: int
    dtype: torch.dtype
    device: torch.device
    evaluations: Evaluations

    def log_prob(self, z: Tensor) -> Tensor:
        """``log p̃`` in nats. ``z``: (B, D); returns (B,). Points outside the support are ``-inf``, never NaN."""
        ...

    def log_prob_and_score(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``log p̃`` (B,) and its gradient (B, D), both detached. Works under ``torch.no_grad()``."""
        ...


@runtime_checkable
class HasPrior(Protocol):
    """A density that is a prior times a likelihood, the prior one that can be drawn from and evaluated."""

    @property
    def has_prior(self) -> bool:
        """Whether it is so for this one: no improper prior, none that depends on a discrete latent."""
        ...

    def prior_draws(self, num_draws: int) -> Tensor:
        """Draws (N, D) of the prior."""
        ...

    def log_prior(self, z: Tensor) -> Tensor:
        """Its normalised log density (B,) in nats at latents ``z`` (B, D)."""
        ...


class Draws(NamedTuple):
    """Latents with all that is known about them.

    ``z``: (N, D). ``log_p``: (N,) ``log p̃(z)`` in nats. ``log_weight``: (N,) with ``E[exp log_weight] = Z``.
    ``score``: (N, D) ``∇ log p̃(z)``, where it was asked for.
    """

    z: Tensor
    log_p: Tensor
    log_weight: Tensor
    score: Tensor | None = None

    @property
    def log_q(self) -> Tensor:
        """``log p̃ − log w`` (N,): the guide's log density, or its unbiased path estimate."""
        return self.log_p - self.log_weight


class RoundInfo(NamedTuple):
    """What a diagnostic needs to know about one round of training (one batch of fresh draws)."""

    round: int
    gamma: float
    """Damping exponent in (0, 1]: the guide was taught ``w^gamma``. 1 means the target itself."""
    ess: float
    """Effective sample size of the undamped weights, as a share of the draws, in (0, 1]."""
    khat: float
    """Pareto shape of the undamped weights; below 0.7 the weights can be trusted."""
    log_evidence: float
    """Estimate of ``log Z`` from this round's draws alone, in nats."""
    log_evidence_se: float
    """Its standard error, in nats."""
    loss: float
    """Mean training loss of the steps since the previous round (NaN in the first)."""
    density_evaluations: int
    gradient_evaluations: int
    seconds: float
    """Seconds of training so far, over all sessions of a resumed run."""


class DiffusionProcess(Protocol):
    """A diffusion sampler as an objective sees it: latents in, latents out, in nats; D is ``dim``."""

    @property
    def dim(self) -> int:
        """D."""
        ...

    @property
    def ratios(self) -> Tensor:
        """Noise-to-signal ratios ``0 = r_0 < … < r_K`` of the kernels, (K+1,)."""
        ...

    def draw(self, num_draws: int) -> tuple[Tensor, Tensor]:
        """Draws ``z`` (N, D) and path log ratios ``R`` (N,) with ``E[exp(log p̃(z) + R)] = Z``."""
        ...

    def path_log_ratio(self, z: Tensor) -> Tensor:
        """``R`` (N,) of a forward-noised path from each given latent (N, D)."""
        ...

    def to_white(self, z: Tensor) -> Tensor:
        """Latents (B, D) in the whitened space of the base."""
        ...

    def to_latent(self, u: Tensor) -> Tensor:
        """Whitened points (B, D) as latents."""
        ...

    def covering_gaussian(self) -> tuple[Tensor, Tensor]:
        """Location (D,) and scale (D, D), lower triangular, of a normal law that reaches what the base reaches."""
        ...

    def log_det(self, u: Tensor) -> Tensor:
        """``log|det ∂z/∂u|`` (B,) of the map from whitened points (B, D) to latents."""
        ...

    def white_score(self, u: Tensor, score: Tensor) -> Tensor:
        """At whitened points (B, D), the score of their law, from the score (B, D) of the latents' law there."""
        ...

    def regression(self, target_mean: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Error, log variance and target, each (B, D), of the denoiser at noised points; see ``denoiser.py``."""
        ...

    def is_trained(self, z: Tensor) -> bool:
        """Whether the network says anything at latents (N, D): before training it does not."""
        ...

    def refitted(self, z: Tensor) -> DiffusionProcess:
        """What is fitted by moments (kernel variances, start) refitted to equally weighted latents (N, D)."""
        ...

    def moved_to(self, z: Tensor, group: Tensor | None = None) -> DiffusionProcess:
        """The base moved to equally weighted latents (N, D); ``group`` (N,): the mode of each, if that is known."""
        ...

    def noncentred(self, z: Tensor, *, begin: bool = True) -> DiffusionProcess | None:
        """In coordinates in which no latent drives the scale of another, if equally weighted latents (N, D) show that
        some do; None where nothing is to be changed. ``begin``: not only if such coordinates are in use."""
        ...


class Bound(Protocol):
    """A diffusion guide bound to a model on its data: what an objective works with."""

    @property
    def density(self) -> Density:
        """The model's batched density on this data."""
        ...

    def diffusion(self) -> DiffusionProcess:
        """The sampler with the current parameters, which it fetches from Pyro once."""
        ...

    def adapt(self, process: DiffusionProcess) -> None:
        """Let the guide take over a sampler that was fitted to draws."""
        ...


@runtime_checkable
class DiffusionGuide(Protocol):
    """A guide that is a diffusion sampler with a denoiser to train, such as AutoDiffusion."""

    def bind(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Bound:
        """The guide on this model and data; the model is inspected and parameters are created at the first call."""
        ...

    def diffusion(self, arguments: Arguments) -> DiffusionProcess:
        """The sampler with the current parameters, of a guide that was bound before."""
        ...


class PathDraws(NamedTuple):
    """Draws as functions of given noise and of the guide's parameters, so that both may be differentiated.

    ``z``: (N, D). ``log_q``: (N,) the guide's log density at ``z``, nats. ``weight``: (N,), summing to one and
    differentiable: ``E_q f ≈ Σ weight · f(z)``; ``1/N`` unless the draws are stratified.
    """

    z: Tensor
    log_q: Tensor
    weight: Tensor


@runtime_checkable
class PathGuide(Protocol):
    """A guide that maps noise to draws and probabilities differentiably, such as AutoGaussianMixture."""

    def path_draws(self, noise: Tensor, arguments: Arguments) -> PathDraws:
        """Draws from standard normal ``noise`` (N, D); row i of every result depends on row i only."""
        ...

    def latent_log_prob(self, z: Tensor, arguments: Arguments) -> Tensor:
        """``log q`` (N,) of any latents (N, D), differentiable, nats."""
        ...


def check_type(name: str, value: object, fits: bool, expected: str) -> None:
    """Refuse an argument of the wrong kind, where something else would fail later and in other words.

    Raises:
        TypeError: it does not fit.
    """
    if not fits:
        found = f"the class {value.__name__}" if isinstance(value, type) else f"{value!r} ({type(value).__name__})"
        raise TypeError(f"expected {name} to be {expected}, found {found}")


def require(objective: object, guide: object, capability: Any) -> Any:
    """Return ``guide`` if it has the ``capability`` (a protocol above), or raise the one error for a mismatch.

    Raises:
        TypeError: ``guide`` lacks the capability; the message names objective, guide and what is missing.
    """
    if isinstance(guide, capability):
        return guide
    wanted = [name for name in dir(capability) if not name.startswith("_") and not hasattr(guide, name)]
    raise TypeError(
        f"{type(objective).__name__} cannot train {type(guide).__name__}: it needs the capability "
        f"{capability.__name__} (missing: {', '.join(wanted)}). {(capability.__doc__ or '').splitlines()[0]}"
    )
