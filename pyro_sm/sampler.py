# SPDX-License-Identifier: Apache-2.0
r"""DiffusionSampler: train a diffusion guide, watch it, stop it, save it, and take draws, as from ``MCMC``.

The loop alternates rounds and steps of :class:`~pyro_sm.ImportanceWeightedScoreMatching`
(``training/trainer.py``). The learning rate is held until γ = 1 and the effective sample size has stopped rising (or
half the budget is spent), then goes linearly to zero; then training ends (``training/schedule.py``). The state is
complete after every step: an interrupted, saved and resumed run continues bit for bit like one that was never
stopped.

With ``num_chains`` > 1 as many guides are trained, each like one that was trained alone with its own seed; see
``corrections/per_replica.py`` for what their draws say together. Where there are cores for it they are trained at
once: all are bound to the data here, each is trained in a process of its own (``training/processes.py``), and its
state taken over.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from pyro_sm.base import Arguments, Draws, RoundInfo, check_type
from pyro_sm.corrections.importance import Correction, ImportanceResampling
from pyro_sm.corrections.per_replica import PerReplica
from pyro_sm.diagnostics.export import Provenance, draws_to_arviz
from pyro_sm.diagnostics.summary import summary_table
from pyro_sm.diagnostics.verdict.check import DEFAULT_PROBE
from pyro_sm.diagnostics.verdict.probe import Probe, ProbeResult
from pyro_sm.diagnostics.verdict.thresholds import Thresholds
from pyro_sm.diagnostics.verdict.verdict import Verdict, judge
from pyro_sm.guides.auto_diffusion import AutoDiffusion
from pyro_sm.guides.bases import Base
from pyro_sm.model.trace import isolated_rng
from pyro_sm.objectives.importance_weighted.objective import ImportanceWeightedScoreMatching
from pyro_sm.smc.local_moves import LocalMoves
from pyro_sm.training.check import Look, ProbeRun, acceptance, examined
from pyro_sm.training.replicas import Replicas
from pyro_sm.training.schedule import Schedule, StoppingRule
from pyro_sm.training.trainer import Trainer
from pyro_sm.weights import Evidence, effective_sample_size, evidence_with_tail, pareto_smooth

_NAMES = itertools.count()
_DRAWS_PER_CHAIN = 1000  # that R̂ compares: it resolves .01 with a few hundred independent draws of each
_MOVE_SEED = 32_452_843  # added to the seed: moves are not made with the numbers of training or draws
# Figures come from a pool of at least so many draws: their k̂ rests on its largest fifth root or so, hundreds of them.
_LEAST_POOL = 16_000
_DRAWS_PER_SAMPLE = (
    4  # of the pool: resampling a fourth of it repeats few draws where the effective share is above that
)


class DiffusionSampler:
    r"""Trains an :class:`~pyro_sm.AutoDiffusion` on a model and draws from it.

    Usage::

        sampler = DiffusionSampler(model)
        sampler.run(data)
        samples = sampler.get_samples(4000)  # {site: (4000, ...)}
        sampler.summary()
        idata = sampler.to_arviz()

    Args:
        model: a Pyro model.
        base: Gaussian base for the default guide (see ``guides/bases.py``); the prior's moments if None.
        guide: a guide of your own instead of the default one.
        objective: a configured objective instead of the default one.
        stopping: budget and stopping rule.
        learning_rate: of Adam, before annealing.
        seed: of all randomness; the global generator is neither used nor changed.
        checkpoint: file to save the state to during the run, or None.
        checkpoint_every: seconds between checkpoints.
        disable_progbar: no progress bar.
        num_chains: replicas, trained with the seeds ``seed``, ``seed + 1``, …, each with the whole budget. Draws of
            each are a chain of their own, so that R̂ sees one that has lost a mode. Checkpoints of the others stand
            beside the first's, with ``.1``, ``.2``, … at the end of their names.
        num_workers: processes that train replicas, with one thread each; as many as there are replicas and cores if
            None, where processes can be forked: on Linux, without CUDA. They leave no trace but the result: what else
            the model stores somewhere is lost. 1 trains one after the other in this process.

    Attributes:
        stopping: budget and stopping rule of the next :meth:`run`; a larger budget reopens a run that it ended.

    Raises:
        ValueError: both ``base`` and ``guide`` are given, or ``num_chains`` or ``num_workers`` < 1.
        TypeError: ``model`` is not callable, ``base`` or ``stopping`` is none, or ``num_chains`` is no integer.

    Source: "Importance Weighted Score Matching for Diffusion Samplers with Enhanced Mode Coverage"
    https://arxiv.org/abs/2505.19431 .
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        base: Base | None = None,
        guide: AutoDiffusion | None = None,
        objective: ImportanceWeightedScoreMatching | None = None,
        stopping: StoppingRule | None = None,
        learning_rate: float = 2e-3,
        seed: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 30.0,
        disable_progbar: bool = False,
        num_chains: int = 1,
        num_workers: int | None = None,
    ) -> None:
        check_type("model", model, callable(model), "callable: a Pyro model")
        fits = stopping is None or isinstance(stopping, StoppingRule)
        check_type("stopping", stopping, fits, "a rule such as StoppingRule(max_evaluations=10000)")
        check_type("num_chains", num_chains, isinstance(num_chains, Integral), "an integer")
        if num_chains < 1:
            raise ValueError(f"expected num_chains >= 1, found {num_chains}")
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"expected num_workers >= 1, found {num_workers}")
        if base is not None and guide is not None:
            raise ValueError("expected a base for the default guide, or a guide with its own base; found both")
        self.model = model
        self.stopping = stopping or StoppingRule()
        self.num_workers = num_workers
        self.disable_progbar = disable_progbar
        guide = guide or AutoDiffusion(model, base=base, name=f"DiffusionSampler{next(_NAMES)}")
        self._replicas = Replicas.of(
            Trainer(
                model,
                guide,
                objective or ImportanceWeightedScoreMatching(),
                stopping=self.stopping,
                learning_rate=learning_rate,
                seed=seed,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                disable_progbar=disable_progbar,
            ),
            num_chains,
        )
        self._probe_run: ProbeRun | None = None
        self._verdict: Verdict | None = None

    # -- running -----------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> tuple[Trainer, ...]:
        """The trainings, one per chain."""
        return self._replicas.trainers

    @property
    def guide(self) -> AutoDiffusion:
        """The guide, of several replicas the first one's; another one after a run on other data."""
        return self.replicas[0].guide

    @property
    def objective(self) -> ImportanceWeightedScoreMatching:
        """The objective, with its state; of several replicas the first one's."""
        return self.replicas[0].objective

    @property
    def history(self) -> tuple[RoundInfo, ...]:
        """What each round measured, oldest first; of several replicas the first one's."""
        return self.replicas[0].history

    @property
    def schedule(self) -> Schedule:
        """Where training stands; of several replicas the first one."""
        return self.replicas[0].schedule

    @property
    def seed(self) -> int:
        """Of all randomness; that of a checkpoint, once loaded."""
        return self.replicas[0].seed

    @property
    def probe_result(self) -> ProbeResult | None:
        """What the last probe of :meth:`check` has found; any guide on the same model and data can use it."""
        return None if self._probe_run is None else self._probe_run.result

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Train on the model's arguments until the stopping rule or the budget ends it; resume if interrupted.

        Ctrl-C stops between two steps, or between two temperatures of the seeding of a population, and raises
        ``KeyboardInterrupt``; the sampler stays usable, and another ``run`` with the same arguments goes on where it
        stopped. An unfinished seeding begins anew. Where replicas are trained at once and one fails, the others are
        stopped in the same way.

        Raises:
            ModelRefusedError: the model cannot be evaluated in batches, or the arguments do not fit it.
            CheckpointError: a loaded checkpoint belongs to another model, other data or other settings.
            ValueError: no draw has a finite density; ``num_workers`` > 1 and no processes can be forked.
            RuntimeError: the process of a replica was killed.
        """
        self._verdict = None
        before = [replica.guide for replica in self.replicas]
        try:
            self._replicas.run(Arguments(args, kwargs), self.stopping, self.num_workers)
        finally:
            if any(replica.guide is not guide for replica, guide in zip(self.replicas, before, strict=True)):
                self._probe_run = None  # other data

    # -- draws -------------------------------------------------------------------------------------------------

    def draws(self, num_draws: int) -> Draws:
        """At least ``num_draws`` weighted draws, kept for later calls; the guide's own come first.

        See :meth:`~pyro_sm.AutoDiffusion.draw_weighted`: the last tenth is the covering component's. Of several
        replicas, as many of each, one after the other.
        """
        return self._replicas.draws(num_draws)

    def _pool(self, num_samples: int = _LEAST_POOL // _DRAWS_PER_SAMPLE) -> Draws:
        return self.draws(max(_DRAWS_PER_SAMPLE * num_samples, _LEAST_POOL))

    def _generator(self) -> torch.Generator:
        return torch.Generator(device=self.replicas[0].density.device).manual_seed(self.seed)

    def _correction(self, correction: Correction | None) -> Correction:
        correction = correction or ImportanceResampling()
        return correction if len(self.replicas) == 1 else PerReplica(correction, len(self.replicas))

    def get_samples(
        self, num_samples: int = 4000, *, correction: Correction | None = None, moves: LocalMoves | None = None
    ) -> dict[str, Tensor]:
        """Constrained draws by site, sample dimension first: ``{site: (num_samples, *shape)}``.

        Args:
            num_samples: how many; a multiple of the number of replicas, whose draws follow each other.
            correction: importance resampling from four times as many guide draws by default;
                :class:`~pyro_sm.corrections.NoCorrection` for the guide's own.
            moves: of every draw that was chosen, by the posterior's score: they part those chosen more than once, and
                mend what is wrong in the small. They do not change the shares of modes.
        """
        check_type("num_samples", num_samples, isinstance(num_samples, Integral), "an integer")
        pool = self._pool(num_samples)
        index = self._correction(correction).apply(pool, num_samples, self._generator())
        first = self.replicas[0]
        density, z = first.density, pool.z[index]
        if moves is not None:
            counting = first.density_counted_apart(first.drawn)
            with torch.no_grad(), isolated_rng(self.seed + _MOVE_SEED):
                z = moves.run(counting, z).z
        return {**density.unpack(z), **density.deterministics(z)}

    @property
    def evidence(self) -> Evidence:
        """``log Z`` and its standard error in nats, from fresh draws of the trained guide."""
        return evidence_with_tail(self._pool().log_weight)

    @property
    def log_evidence(self) -> float:
        """Estimate of ``log Z`` in nats."""
        return self.evidence.log_evidence

    @property
    def log_evidence_se(self) -> float:
        """Its standard error, in nats."""
        return self.evidence.log_evidence_se

    @property
    def khat(self) -> float:
        """Pareto shape of the final weights; above 0.7 do not trust them."""
        return pareto_smooth(self._pool().log_weight).khat

    @property
    def ess(self) -> float:
        """Effective share of the final draws, in (0, 1]."""
        log_weight = self._pool().log_weight
        return effective_sample_size(log_weight) / log_weight.shape[0]

    def check(
        self,
        *,
        probe: Probe | ProbeResult | None = DEFAULT_PROBE,
        correction: Correction | None = None,
        stein_draws: int = 0,
        thresholds: Thresholds | None = None,
    ) -> Verdict:
        """Can it be trusted? A verdict with its reasons, to print; :meth:`to_arviz` records it.

        The weights, the evidence, the training and the replicas are looked at, and a probe that never saw the guide
        looks for what it has lost (see ``diagnostics/verdict/``); its evaluations are counted apart, in
        ``verdict.findings.probe``. What it found is kept for the next call. Ctrl-C leaves everything as it was.

        Args:
            probe: how to look elsewhere; what an earlier look has found; or None not to look.
            correction: that you use for draws: of :class:`~pyro_sm.corrections.IndependentMetropolis` the acceptance
                is judged.
            stein_draws: of the kernel Stein test, 0 for none; each costs a gradient evaluation.
            thresholds: where the lines are drawn.

        Raises:
            ValueError: nothing has been run yet.
        """
        pool, count, chains = self._pool(), len(self.replicas), []
        if count > 1:
            index = self._correction(None).apply(pool, _DRAWS_PER_CHAIN * count, self._generator())
            chains = [pool.z[index].unflatten(0, (count, _DRAWS_PER_CHAIN))]
        found, self._probe_run = examined(
            self.replicas,
            pool,
            Look(probe, stein_draws, thresholds),
            self._probe_run,
            chains=chains,
            accepted=acceptance(correction, pool.log_weight, self._generator()),
            seed=self.seed,
            disable_progbar=self.disable_progbar,
        )
        self._verdict = judge(found, thresholds)
        return self._verdict

    def to_arviz(self, num_samples: int = 4000, *, correction: Correction | None = None, **options: Any) -> Any:
        """``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x); see ``diagnostics/export.py`` for ``options``.

        With the verdict, if :meth:`check` was called; of several replicas every chain is one.
        """
        pool, counted = self._pool(num_samples), self._replicas.counted()
        provenance = Provenance(type(self.objective).__name__, self.seed, counted.values, counted.scores)
        if len(self.replicas) > 1:
            options.setdefault("num_chains", len(self.replicas))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return draws_to_arviz(
                self.replicas[0].density,
                pool,
                num_samples=num_samples,
                correction=self._correction(correction),
                provenance=provenance,
                history=self.history,
                verdict=self._verdict,
                num_replicas=len(self.replicas),
                **options,
            )

    def report(self) -> str:
        """Evidence, weights and cost, a line each; non-centred coordinates and the verdict, where there are any."""
        lines = self._replicas.report(self.evidence, self.khat, self.ess)
        return lines if self._verdict is None else f"{lines}\n{self._verdict}"

    def summary(self, num_samples: int = 4000) -> None:
        """Print evidence, weights, cost, and ArviZ's summary table of the corrected draws."""
        idata = self.to_arviz(num_samples, predictive=False, log_likelihood=False, prior=False)
        print(f"{self.report()}\n{summary_table(idata)}")

    # -- saving ------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole state to ``path``, atomically; a later :meth:`load` and :meth:`run` continue from it.

        Replicas that have begun are written beside it, with ``.1``, ``.2``, … at the end of the name.

        Raises:
            CheckpointError: the file cannot be written.
            ValueError: nothing has been run yet.
        """
        self._replicas.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read a state written by :meth:`save`; the next :meth:`run` checks that model and data are the same.

        Raises:
            CheckpointError: the file is missing, damaged, or was made with other settings.
        """
        self._verdict = None
        self._replicas.load(path)
