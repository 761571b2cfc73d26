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

*Uniformity.* N ranks give ``R_i = #{n : r_n < i}``, i = 1, …, L, with ``R_i ~ Binomial(N, i/(L+1))`` where they are
uniform. The level of a trajectory is its smallest pointwise two-sided p-value,

    ``γ = min_i 2 min{P(Bin ≤ R_i), P(Bin ≥ R_i)}``,

and ``P(γ > g)`` is the probability of staying between the binomial quantiles at all L points. It is computed exactly:
the counts of the L + 1 cells are independent Poisson variables given their sum, so one product of a vector with a
Poisson matrix per point, rows outside of the quantiles struck out, gives it. That yields the p-value ``P(γ ≤ γ_obs)``
and the simultaneous band, with no simulation and no asymptotics; a trajectory leaves the band of level α exactly if
its p-value is at most α. A χ² test over bins of equal width stands beside it.

Sources: "Validating Bayesian Inference Algorithms with Simulation-Based Calibration"
https://arxiv.org/abs/1804.06788 ; "Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test
Quantities Shapes Sensitivity" https://arxiv.org/abs/2211.02383 ; "Graphical Test for Discrete Uniformity and its
Applications in Goodness of Fit Evaluation and Multiple Sample Comparison" https://arxiv.org/abs/2103.10522 .
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
from pyro_sm.model import ModelDensity
from pyro_sm.model_trace import Recorder, TracedModel, call_model, is_deterministic, isolated_rng, nodes

LOG_LIKELIHOOD = "log likelihood"
_SIMULATING, _FITTING, _TIES = range(3)  # streams of random numbers that must not meet
_PER_BIN, _MOST_BINS = 5, 20


# -------------------------------------------------------------------------------------------------- uniformity


class Band(NamedTuple):
    """Where all of ``R_i/N − i/(L+1)`` lie at once with the probability asked for.

    ``at``: (L,) the points ``i/(L+1)``. ``lower``, ``upper``: (L,), the ends included.
    """

    at: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


class Uniformity(NamedTuple):
    """``p_value``: of the ECDF's largest excursion, exact. ``chi_square``: p-value of the χ² test, asymptotic."""

    p_value: float
    chi_square: float


def _pointwise(num_ranks: int, num_draws: int) -> np.ndarray:
    """Two-sided p-values ``2 min{P(Bin ≤ k), P(Bin ≥ k)}`` (L, N+1) of ``R_i = k``."""
    k = np.arange(num_ranks + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num_ranks + 1)))])
    at = (np.arange(1, num_draws + 1) / (num_draws + 1))[:, None]
    log_choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
    below = np.exp(log_choose + k * np.log(at) + (num_ranks - k) * np.log1p(-at)).cumsum(1)
    # The mirror image, rather than a sum from above: what is equal by symmetry then is so to the last digit.
    return 2 * np.minimum(below, below[::-1, ::-1])


def _stays(inside: np.ndarray) -> float:
    """Probability that uniform ranks have ``inside[i, R_i]`` for all i; ``inside``: (L, N+1)."""
    num_points, n = inside.shape[0], inside.shape[1] - 1
    mean = n / (num_points + 1)
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(k[1:]))])
    poisson = np.exp(k * math.log(mean) - mean - log_factorial)
    step = k[None, :] - k[:, None]
    kernel = np.where(step >= 0, poisson[np.maximum(step, 0)], 0.0)
    reached = (k == 0).astype(float)
    for row in inside:
        reached = (reached @ kernel) * row
    total = math.exp(n * math.log(n) - n - log_factorial[-1])
    return float(np.clip((reached @ kernel)[n] / total, 0.0, 1.0))


def _counts_below(ranks: np.ndarray, num_draws: int) -> np.ndarray:
    """``R_i`` (L,)."""
    return np.bincount(ranks, minlength=num_draws + 1).cumsum()[:-1]


def _checked(ranks: Any, num_draws: int) -> np.ndarray:
    found = np.asarray(ranks)
    if found.ndim != 1 or not len(found) or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"expected whole ranks (N,), N >= 1, found {found.dtype} of shape {found.shape}")
    if num_draws < 1 or found.min() < 0 or found.max() > num_draws:
        raise ValueError(f"expected ranks in 0..{num_draws}, found {found.min()}..{found.max()}")
    return found


def ecdf_difference(ranks: Any, num_draws: int) -> np.ndarray:
    """``R_i/N − i/(L+1)`` (L,) of ranks (N,) in ``0, …, L = num_draws``; positive where ranks are too small.

    Raises:
        ValueError: no ranks, or one that is not a whole number in that range.
    """
    found = _checked(ranks, num_draws)
    return _counts_below(found, num_draws) / len(found) - np.arange(1, num_draws + 1) / (num_draws + 1)


def simultaneous_band(num_ranks: int, num_draws: int, level: float = 0.95) -> Band:
    """The narrowest band between binomial quantiles of one level that holds with probability ``level`` or more.

    Args:
        num_ranks: N, data sets.
        num_draws: L, so that ranks are in ``0, …, L``.
        level: the probability that uniform ranks stay inside at all points, in (0, 1).

    Raises:
        ValueError: a number out of range.
    """
    if num_ranks < 1 or num_draws < 1 or not 0 < level < 1:
        raise ValueError(
            f"expected num_ranks >= 1, num_draws >= 1, level in (0, 1), found {num_ranks}, {num_draws}, {level}"
        )
    pointwise = _pointwise(num_ranks, num_draws)
    # The band shrinks as the pointwise level rises: find the last that still holds.
    levels = np.unique(pointwise[pointwise <= 1.0])
    low, high = 0, len(levels)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _stays(pointwise >= levels[middle]) >= level else (low, middle)
    inside = pointwise >= levels[low]
    at = np.arange(1, num_draws + 1) / (num_draws + 1)
    lower, upper = inside.argmax(1), num_ranks - inside[:, ::-1].argmax(1)
    return Band(at, lower / num_ranks - at, upper / num_ranks - at)


def uniformity(ranks: Any, num_draws: int) -> Uniformity:
    """Test that ranks (N,) are uniform on ``0, …, L = num_draws``; see the head.

    The χ² test has as many bins, at most 20, as leave five ranks in each on average (p-value 1 below ten).

    Raises:
        ValueError: no ranks, or one that is not a whole number in that range.
    """
    found = _checked(ranks, num_draws)
    pointwise = _pointwise(len(found), num_draws)
    observed = pointwise[np.arange(num_draws), _counts_below(found, num_draws)].min()
    return Uniformity(1.0 - _stays(pointwise > observed), _chi_square(found, num_draws))


def _chi_square(ranks: np.ndarray, num_draws: int) -> float:
    num_bins = min(_MOST_BINS, len(ranks) // _PER_BIN, num_draws + 1)
    if num_bins < 2:
        return 1.0
    width = np.bincount(np.arange(num_draws + 1) * num_bins // (num_draws + 1))  # in ranks; not all the same
    expected = len(ranks) * width / (num_draws + 1)
    found = np.bincount(ranks * num_bins // (num_draws + 1), minlength=num_bins)
    statistic = ((found - expected) ** 2 / expected).sum()
    half = torch.tensor([(num_bins - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


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
        """By test quantity."""
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
