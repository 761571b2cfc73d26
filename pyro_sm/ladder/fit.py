# SPDX-License-Identifier: Apache-2.0
r"""An answer without training: the model bound, its modes searched, a mixture of t laws, weights, evidence.

:func:`fit_mixture` runs :class:`~pyro_sm.ladder.mode_mixture.ModeMixture` and, where fewer than two in five of its
draws count, :class:`~pyro_sm.ladder.adaptive_importance.AdaptiveImportanceSampling` from what it left. Of the two the
one of which more draws count is kept.

Good weights speak of the modes that were found, and of no other: on random mixtures half of the answers with good
weights were wrong after 32 ascents. So the result says how complete the search was, and :meth:`MixtureFit.check`
is at best *use with care* until a probe of its own has looked elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_sm.base import Draws
from pyro_sm.corrections import ImportanceResampling
from pyro_sm.diagnostics.export import Provenance, draws_to_arviz
from pyro_sm.diagnostics.verdict.check import look_elsewhere, probe_progress
from pyro_sm.diagnostics.verdict.findings import Findings
from pyro_sm.diagnostics.verdict.probe import Probe, ProbeResult, start_for
from pyro_sm.diagnostics.verdict.probe_findings import measure_probe
from pyro_sm.diagnostics.verdict.thresholds import Thresholds
from pyro_sm.diagnostics.verdict.trust import Reason, Trust
from pyro_sm.diagnostics.verdict.verdict import Verdict, judge
from pyro_sm.diagnostics.verdict.weights import WeightFindings, measure_weights
from pyro_sm.ladder.adaptive_importance import AdaptiveImportanceSampling, first_proposal
from pyro_sm.ladder.mode_mixture import ModeMixture
from pyro_sm.ladder.weighted_mixture import WeightedMixture, weighted_draws
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.trace import isolated_rng
from pyro_sm.search.completeness import Completeness
from pyro_sm.search.starts import SearchStart, start_of
from pyro_sm.smc.mixture_start import moments

_ENOUGH = 0.4  # effective share: rounds of adaptation hardly reach more, and cost more than what the draws gain
_LEAST = 0.1  # effective share that a larger pool makes up for; below, draws repeat
_MODES, _ADAPTIVE = ModeMixture(), AdaptiveImportanceSampling()


@dataclass(frozen=True)
class MixtureFit:
    """What :func:`fit_mixture` leaves.

    Args:
        result: the mixture with its weighted pool.
        search: how complete the search for modes was.
        seed: of all randomness.
        density: the model with its data.
    """

    result: WeightedMixture
    search: Completeness
    seed: int
    density: ModelDensity = field(repr=False)

    @property
    def log_evidence(self) -> float:
        """``log Ẑ``, nats."""
        return self.result.log_evidence

    @property
    def log_evidence_se(self) -> float:
        """Its standard error, nats: of the weights there are, and of what a heavy tail has above them."""
        return self.result.log_evidence_se

    @property
    def khat(self) -> float:
        """Pareto shape of the weights; above 0.7 do not trust them."""
        return self.result.khat

    @property
    def ess(self) -> float:
        """Effective share of the draws, in [0, 1]."""
        return self.result.ess

    def get_samples(self, num_samples: int = 4000) -> dict[str, Tensor]:
        """Constrained draws by site, sample dimension first, chosen by their weights.

        More than the pool is worth are chosen from a larger one: a value of the density for every further draw.

        Raises:
            ValueError: no draw has a weight, or fewer than one is asked for.
        """
        pool = self._pool(num_samples)
        with isolated_rng(self.seed):
            index = ImportanceResampling().apply(pool, num_samples)
        with torch.no_grad():
            return self.density.unpack(pool.z[index])

    def check(
        self,
        *,
        probe: Probe | ProbeResult | None = None,
        thresholds: Thresholds | None = None,
        disable_progbar: bool = False,
    ) -> Verdict:
        """Whether it can be trusted: the weights, the search for modes, and a probe where one is given.

        Args:
            probe: how to look elsewhere, ``Probe()``, or what an earlier look has found. Without one the verdict is
                at best *use with care*.
            thresholds: where the lines are drawn.
            disable_progbar: no progress bar for the probe.
        """
        pool = self.result.draws
        if not bool(torch.isfinite(pool.log_weight).any()):
            return judge(Findings(WeightFindings(len(pool.z), math.inf, 0.0)), thresholds)
        findings = Findings(measure_weights(pool.log_weight))
        if isinstance(probe, Probe):
            with isolated_rng(self.seed), probe_progress(disable_progbar) as report:
                start = start_for(self.density, lambda: moments(pool.z))
                probe = look_elsewhere(probe, self.density, start, pool.log_weight, thresholds, report)
        if probe is not None:
            own = None if probe.failure else probe.log_p.double() - self.result.mixture.log_prob(probe.z.double())
            found = measure_probe(pool.log_weight, probe, [] if own is None else [own])
            findings = replace(findings, probe=found)
        return _with_search(judge(findings, thresholds), self.search)

    def report(self) -> str:
        """Evidence, weights, method, search and cost, a line each."""
        spent = self.result.evaluations
        return (
            f"log evidence  {self.log_evidence:.3f} ± {self.log_evidence_se:.3f} nats\n"
            f"weights       Pareto k̂ {self.khat:.2f} (trust below 0.7), effective share {self.ess:.2f}\n"
            f"method        {self.result.method}; {self.result.mixture.num_components} t laws\n"
            f"search        {self.search}\n"
            f"cost          {spent.values} density and {spent.scores} gradient evaluations "
            f"({self.density.batching_method})"
        )

    def to_arviz(
        self,
        num_samples: int = 4000,
        *,
        num_chains: int = 4,
        verdict: Verdict | None = None,
        predictive: bool = True,
        log_likelihood: bool = True,
        prior: bool = True,
        legacy: bool | None = None,
    ) -> Any:
        """As ArviZ data, with weights, evidence and verdict recorded.

        Args:
            num_samples: draws in ``posterior``, over all chains, chosen by their weights.
            num_chains: how many chains they are dealt to; divides ``num_samples``.
            verdict: of :meth:`check`, such as one with a probe; one without is made if None.
            predictive: whether to draw ``posterior_predictive``.
            log_likelihood: whether to compute ``log_likelihood``.
            prior: whether to draw ``prior``.
            legacy: ``True`` for ``InferenceData``, ``False`` for ``DataTree``, ``None`` for what is installed.

        Raises:
            ValueError: ``num_chains`` does not divide ``num_samples``, or no draw has a weight.
            ImportError: the line of ArviZ asked for is not installed.

        Warns:
            TrustWarning: the weights cannot be trusted.
        """
        spent, pool = self.result.evaluations, self._pool(num_samples)
        with isolated_rng(self.seed):
            return draws_to_arviz(
                self.density,
                pool,
                provenance=Provenance(self.result.method, self.seed, spent.values, spent.scores),
                num_samples=num_samples,
                num_chains=num_chains,
                verdict=verdict or self.check(),
                predictive=predictive,
                log_likelihood=log_likelihood,
                prior=prior,
                legacy=legacy,
            )

    def _pool(self, num_samples: int) -> Draws:
        """The pool, with further draws where it is worth fewer than ``num_samples``; the same every time."""
        pool = self.result.draws
        missing = math.ceil(num_samples / max(self.ess, _LEAST)) - len(pool.z)
        if missing <= 0:
            return pool
        with isolated_rng(self.seed + 1), torch.no_grad():
            more = weighted_draws(self.density, self.result.mixture, missing)
        z, log_p = torch.cat([pool.z, more.z]), torch.cat([pool.log_p, more.log_p])
        return Draws(z, log_p, torch.cat([pool.log_weight, more.log_weight]))


def _with_search(verdict: Verdict, search: Completeness) -> Verdict:
    """The verdict with what the search for modes says.

    Where it was not complete at most *use with care*. Where no ascent ended at a mode the density grows without
    bound, as that of a funnel does, and *do not trust*: the neck has mass that no draw need have seen.
    """
    text = f"search for modes: {search}"
    if search.num_places == 0:
        advice = "reparametrise the model (non-centre its scales), or train a sampler on it"
        reason = Reason(text, advice, Trust.DISTRUST)
    elif not search.is_complete:
        advice = "search with more starts (MultiStartSearch), or from a base that reaches farther"
        reason = Reason(text, advice, Trust.CARE)
    else:
        reason = Reason(text, "", Trust.TRUST)
    reasons = sorted([*verdict.reasons, reason], key=lambda r: -r.level)
    return replace(verdict, level=max(verdict.level, reason.level), reasons=tuple(reasons))


def fit_mixture(
    model: Callable[..., Any],
    *args: Any,
    seed: int = 0,
    start: SearchStart | None = None,
    modes: ModeMixture = _MODES,
    adaptive: AdaptiveImportanceSampling | None = _ADAPTIVE,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> MixtureFit:
    """A mixture of t laws for a model's posterior, weighted, in a second where the model is cheap.

    Usage::

        fit = fit_mixture(model, data)
        print(fit.report(), fit.check(), sep="\\n")
        samples = fit.get_samples(4000)

    Args:
        model: the Pyro model.
        *args: what the model is called with.
        seed: of all randomness; the global generators are put back afterwards. How many ascents are made depends on
            the speed of the machine besides, unless ``modes`` says how many.
        start: where the search begins; the prior if it can be drawn from, else a standard normal law.
        modes: settings of the search and of the mixture at the modes.
        adaptive: settings of the adaptive importance sampling that follows where fewer than .4 of the draws count;
            None for none.
        dtype: of the latents; that of the model's own draws if None. Regressions in raw units need ``torch.float64``
            (with data of that type).
        **kwargs: what the model is called with, by name.

    Raises:
        ModelRefusedError: the model cannot be evaluated in batches.
    """
    density = ModelDensity(model, args, kwargs, dtype=dtype)
    with isolated_rng(seed), torch.no_grad():
        start = start_of(density) if start is None else start
        result = modes.run(density, start)
        search = result.search or Completeness(0, ())
        if adaptive is not None and not result.ess >= _ENOUGH:
            other = adaptive.run(density, first_proposal(result, start))
            spent = result.evaluations + other.evaluations
            result = replace(other if other.ess > result.ess else result, evaluations=spent, search=search)
    return MixtureFit(result, search, seed, density)
