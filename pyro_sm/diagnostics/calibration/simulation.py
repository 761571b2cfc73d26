# SPDX-License-Identifier: Apache-2.0
r"""Simulation-based calibration: are the posteriors right on average over the model's own prior?

Parameters and data are drawn from the model, ``θ* ~ p(θ)``, ``y ~ p(y | θ*)``, and the sampler under test gives draws
``θ_1 … θ_L`` for ``y``. If they come from ``p(θ | y)``, then ``θ*, θ_1, …, θ_L`` are exchangeable given ``y``, so
that for every test quantity ``f(θ, y)`` the rank

    ``r = #{l : f(θ_l, y) < f(θ*, y)} + U{0, …, #{l : f(θ_l, y) = f(θ*, y)}}``

is uniform on ``0, …, L``, whatever the model, and independent from one data set to the next. Test quantities are the
scalar parameters and the log likelihood ``log p(y | θ)``. The second depends on the data, and so it sees what no
parameter does: draws from the prior, for one, have uniform ranks of every parameter.

*Few draws out of many.* Importance resampling repeats draws, and a Markov chain's resemble their neighbours; neither
are L independent draws. So L of about a hundred are taken, evenly spaced, from the thousands that a fit leaves. Given
the posterior probability ``u`` below ``θ*``, independent draws have ``Var(r/L) = u(1−u)/L``; L out of a pool worth
``n_eff`` have ``u(1−u)(1/L + 1/n_eff)``, about. With ``n_eff`` of thousands nothing of that is seen; with L near
``n_eff`` the ranks come in steps, and a right posterior would fail.

Whether ranks are uniform is told by ``rank_uniformity.py``.

Sources: "Validating Bayesian Inference Algorithms with Simulation-Based Calibration"
https://arxiv.org/abs/1804.06788 ; "Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test
Quantities Shapes Sensitivity" https://arxiv.org/abs/2211.02383 .
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from pyro_sm.base import ModelRefusedError
from pyro_sm.diagnostics.calibration.rank_uniformity import Uniformity, uniformity
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.trace import Recorder, TracedModel, call_model, is_deterministic, isolated_rng, nodes

LOG_LIKELIHOOD = "log likelihood"
_SIMULATING, _FITTING, _TIES = range(3)  # streams of random numbers that must not meet


# ------------------------------------------------------------------------------------------------- simulation


class Simulated(NamedTuple):
    """A data set drawn from the model.

    ``model(*args, **kwargs)`` is the model with this data in the place of its own. ``data``: by observed site.
    ``truth``: what it was drawn with, by latent and deterministic site. ``seed``: for the fit.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    data: dict[str, Tensor]
    truth: dict[str, Tensor]
    seed: int


class Fitted(NamedTuple):
    """Posterior draws by latent site (M, \\*site), M ≥ L, a Markov chain's in their order; ``info`` goes along."""

    samples: Mapping[str, Tensor]
    info: Mapping[str, Any] = {}


class Replication(NamedTuple):
    """One data set: its number, the rank of the truth by test quantity, and the ``info`` of the fit."""

    dataset: int
    ranks: dict[str, int]
    info: dict[str, Any]


Fit = Callable[[Simulated], Fitted]


def _seed(seed: int, index: int, stream: int) -> int:
    """Of its own for each purpose: a sampler on the stream that drew the truth would draw the truth."""
    return int(np.random.SeedSequence((seed, index, stream)).generate_state(1)[0])


def _with_data(model: Callable[..., Any], data: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return poutine.condition(model, data=data)(*args, **kwargs)


def simulate(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    index: int = 0,
    seed: int = 0,
) -> Simulated:
    """Parameters and data from the model: one run in which the observed sites are drawn, not observed.

    The model is called with its ordinary arguments. Data count as such at the ``obs=`` of a sample statement (or
    where the model is conditioned); whatever else the arguments do stays as it is, in simulation and fit alike.

    Args:
        model: a Pyro model, all priors proper, without factors and scales.
        args: its positional arguments.
        kwargs: its keyword arguments.
        index: which data set.
        seed: of all of them; the same seed and index give the same data set, the global generator stays as it is.

    Raises:
        ModelRefusedError: the model cannot be run, or has a site that cannot be drawn: a factor, a scale, an improper
            prior; or nothing is observed.
    """
    given = dict(kwargs or {})
    with isolated_rng(_seed(seed, index, _SIMULATING)), torch.no_grad():
        traced = TracedModel(model, tuple(args), given)
        observed = _observed(traced)
        recorder = Recorder({}, traced.params, draw=True, redraw=observed)
        drawn = nodes(call_model(partial(traced.run, recorder)))
    if recorder.improper:
        raise ModelRefusedError(f"the prior of {recorder.improper[0]!r} is improper: nothing can be drawn from it")
    data = {name: drawn[name]["value"].detach() for name in drawn if name in observed}
    truth = {name: site["value"].detach() for name, site in drawn.items() if name not in observed}
    bound = partial(_with_data, model)
    return Simulated(bound, (data, *args), given, data, truth, _seed(seed, index, _FITTING))


def _observed(traced: TracedModel) -> frozenset[str]:
    """Names of the sites with data.

    Raises:
        ModelRefusedError: there are none, or a site has no law to draw from.
    """
    recorder = Recorder({}, traced.params, draw=True)
    names = []
    for name, site in nodes(call_model(partial(traced.run, recorder))).items():
        scaled = site["scale"] is not None and bool((torch.as_tensor(site["scale"]) != 1).any())
        if scaled or isinstance(getattr(site["fn"], "base_dist", site["fn"]), Unit):
            kind = "scaled" if scaled else "a factor"
            raise ModelRefusedError(f"the site {name!r} is {kind}: the model is no law that data could be drawn from")
        if site["is_observed"] and not is_deterministic(site):
            names.append(name)
    if not names:
        raise ModelRefusedError("the model observes nothing, so there is no posterior to check")
    return frozenset(names)


def _components(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Scalar components ``name[i, j]`` of ``value`` (K, \\*shape), each (K,)."""
    for place in np.ndindex(*value.shape[1:]):
        label = f"{name}[{', '.join(map(str, place))}]" if place else name
        yield label, value[(slice(None), *place)]


def _log_likelihood(density: ModelDensity, z: Tensor) -> Tensor:
    """``log p(y | θ)`` (K,); the joint density where the prior cannot be taken off it, which depends on data too."""
    with torch.no_grad():
        log_joint = density.log_prob(z)
        return log_joint - density.log_prior(z) if density.has_prior else log_joint


def ranks_of(
    simulated: Simulated,
    samples: Mapping[str, Tensor],
    density: ModelDensity,
    *,
    num_draws: int = 99,
    sites: Sequence[str] | None = None,
    generator: np.random.Generator | None = None,
) -> dict[str, int]:
    """Rank of the truth among ``num_draws`` draws, evenly spaced, by test quantity; see the head.

    Args:
        simulated: the data set, with its truth.
        samples: draws (M, \\*site) of all latent sites, and of other ``sites`` asked for.
        density: of the model on this data.
        num_draws: L.
        sites: whose components are test quantities: latent and deterministic ones, by default the continuous latent.
        generator: breaks ties.

    Raises:
        ValueError: a site is missing or of the wrong shape; fewer than L draws; a value is NaN.
    """
    generator = generator or np.random.default_rng()
    latent = [site.name for site in density.sites]
    wanted = list(latent if sites is None else sites)
    values = {}
    for name in dict.fromkeys([*latent, *wanted]):
        if name not in simulated.truth or name not in samples:
            where, names = ("samples", samples) if name in simulated.truth else ("model", simulated.truth)
            raise ValueError(f"expected the site {name!r} in the {where}, found {', '.join(names)}")
        truth, draws = simulated.truth[name], torch.as_tensor(samples[name]).detach()
        if draws.shape[1:] != truth.shape or len(draws) < num_draws:
            shape = ", ".join(map(str, truth.shape))
            raise ValueError(
                f"site {name!r}: expected draws (M, {shape}), M >= {num_draws}, found {tuple(draws.shape)}"
            )
        chosen = torch.arange(num_draws) * len(draws) // num_draws
        values[name] = torch.cat([truth[None], draws[chosen].to(truth)])
    quantities = {label: value for name in wanted for label, value in _components(name, values[name])}
    z = density.pack({name: values[name] for name in latent})
    quantities[LOG_LIKELIHOOD] = _log_likelihood(density, z)
    return {label: _rank(label, value, generator) for label, value in quantities.items()}


def _rank(label: str, value: Tensor, generator: np.random.Generator) -> int:
    """Of ``value[0]`` among ``value[1:]``, ties broken at random."""
    if bool(torch.isnan(value).any()):
        raise ValueError(f"expected numbers for the test quantity {label!r}, found NaN")
    below, equal = int((value[1:] < value[0]).sum()), int((value[1:] == value[0]).sum())
    return below + int(generator.integers(equal + 1))


def simulation_based_calibration(
    model: Callable[..., Any],
    fit: Fit,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    datasets: Iterable[int] = range(100),
    num_draws: int = 99,
    sites: Sequence[str] | None = None,
    seed: int = 0,
) -> Iterator[Replication]:
    """Simulate, fit and rank, a data set at a time; a data set is ready as soon as it is yielded.

    A data set depends on ``seed`` and its number alone, so a run that was stopped goes on with the numbers that are
    missing. Usage::

        def fit(simulated):
            sampler = DiffusionSampler(simulated.model, seed=simulated.seed)
            sampler.run(*simulated.args, **simulated.kwargs)
            return Fitted(sampler.get_samples(4000), {"khat": sampler.khat})

        done = list(simulation_based_calibration(model, fit, (y, sigma)))
        print(Calibration.of(done, 99))

    Args:
        model: a Pyro model, called as always; see :func:`simulate`.
        fit: from a :class:`Simulated` to :class:`Fitted`, by any method.
        args: its positional arguments, data included: their shapes count, their values are replaced.
        kwargs: its keyword arguments.
        datasets: numbers of the data sets.
        num_draws: L; ranks are in ``0, …, L``, and L + 1 = 100 divides well.
        sites: see :func:`ranks_of`.
        seed: of everything, the fits included.

    Raises:
        ModelRefusedError: data cannot be drawn from the model, or it cannot be evaluated in batches.
        ValueError: what ``fit`` returns does not fit the model.
    """
    density: ModelDensity | None = None
    for index in datasets:
        simulated = simulate(model, args, kwargs, index=index, seed=seed)
        fitted = fit(simulated)
        # One for all data sets: to verify a density costs some hundred runs of the model.
        density = density or ModelDensity(simulated.model, simulated.args, simulated.kwargs)
        here = _rebound(density, simulated)
        ties = np.random.default_rng(_seed(seed, index, _TIES))
        ranks = ranks_of(simulated, fitted.samples, here, num_draws=num_draws, sites=sites, generator=ties)
        yield Replication(index, ranks, dict(fitted.info))


def _rebound(density: ModelDensity, simulated: Simulated) -> ModelDensity:
    """``density`` on this data. Its model conditions on its first argument, so it is the same for all of them."""
    return density.with_data(simulated.args, simulated.kwargs)


class Calibration(NamedTuple):
    """Ranks (N,) by test quantity, in ``0, …, num_draws``; ``print`` shows the tests."""

    ranks: dict[str, np.ndarray]
    num_draws: int

    @staticmethod
    def of(replications: Iterable[Replication], num_draws: int) -> Calibration:
        """Gather data sets.

        Raises:
            ValueError: there are none, or their test quantities differ.
        """
        done = list(replications)
        if not done:
            raise ValueError("expected at least one data set, found none")
        for one in done:
            if one.ranks.keys() != done[0].ranks.keys():
                raise ValueError(
                    f"expected the test quantities {', '.join(done[0].ranks)} in all data sets, found "
                    f"{', '.join(one.ranks)} in number {one.dataset}"
                )
        return Calibration({name: np.array([one.ranks[name] for one in done]) for name in done[0].ranks}, num_draws)

    def tests(self) -> dict[str, Uniformity]:
        """Whether the ranks of each test quantity are uniform, by its name."""
        return {name: uniformity(ranks, self.num_draws) for name, ranks in self.ranks.items()}

    def smallest(self) -> tuple[str, float]:
        """The test quantity with the smallest exact p-value, and that value times their number (Bonferroni), ≤ 1."""
        tests = self.tests()
        name = min(tests, key=lambda key: tests[key].p_value)
        return name, min(1.0, len(tests) * tests[name].p_value)

    def shape(self, name: str) -> tuple[float, float]:
        """Mean rank, of 1, and the ranks' standard deviation in units of a uniform law's.

        A mean above ½: the truth lies above the draws, which are too low. A spread above 1: the truth is in the tails
        too often, and the posteriors are too narrow; below 1, too wide.
        """
        centred = self.ranks[name] / self.num_draws - 0.5
        spread = math.sqrt((1 + 2 / self.num_draws) / 12)
        return float(0.5 + centred.mean()), float(np.sqrt(np.square(centred).mean())) / spread

    def __str__(self) -> str:
        width = max(map(len, self.ranks))
        lines = [f"{'':{width}}  p (ECDF)   p (χ²)  mean rank  spread"]
        for name, test in self.tests().items():
            mean, spread = self.shape(name)
            lines.append(f"{name:{width}}  {test.p_value:8.3f} {test.chi_square:8.3f}  {mean:9.3f}  {spread:6.2f}")
        name, corrected = self.smallest()
        count = len(next(iter(self.ranks.values())))
        last = f"smallest of {len(self.ranks)}: {name}, p = {corrected:.3f} after Bonferroni; {count} data sets"
        return "\n".join([*lines, last])
