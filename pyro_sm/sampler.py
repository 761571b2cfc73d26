# SPDX-License-Identifier: Apache-2.0
r"""DiffusionSampler: train a diffusion guide, watch it, stop it, save it, and take draws, as from ``MCMC``.

The loop alternates rounds and steps of :class:`~pyro_sm.ImportanceWeightedScoreMatching`. The learning rate is held
until γ = 1 and the effective sample size has stopped rising (or half the budget is spent), then goes linearly to
zero; then training ends. The state is complete after every step: an interrupted, saved and resumed run continues
bit for bit like one that was never stopped.

With ``num_chains`` > 1 as many guides are trained, each like one that was trained alone with its own seed; see
``replicas.py`` for what their draws say together. Where there are cores for it they are trained at once: all are
bound to the data here, each is trained in a process of its own (``parallel_training.py``), and its state taken over.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_sm.base import CheckpointError, Draws, Evaluations, PyroSMWarning, RoundInfo
from pyro_sm.corrections.importance import Correction, ImportanceResampling
from pyro_sm.corrections.metropolis import IndependentMetropolis
from pyro_sm.corrections.per_replica import PerReplica, joined
from pyro_sm.diagnostics.export import Provenance, draws_to_arviz
from pyro_sm.diagnostics.summary import summary_table
from pyro_sm.diagnostics.verdict.check import (
    DEFAULT_PROBE,
    chain_findings,
    look_elsewhere,
    pool_findings,
    probe_findings,
    probe_progress,
    stein_findings,
    training_findings,
)
from pyro_sm.diagnostics.verdict.probe import Probe, ProbeResult, start_for
from pyro_sm.diagnostics.verdict.verdict import Findings, Thresholds, Verdict, judge
from pyro_sm.diffusion.covering import default_covering, process_log_weight
from pyro_sm.guides.auto_diffusion import AutoDiffusion
from pyro_sm.guides.bases import Base
from pyro_sm.model.cache import same_arguments, tensor_versions
from pyro_sm.model.density import ModelDensity
from pyro_sm.model.trace import isolated_rng
from pyro_sm.objectives.importance_weighted.buffer import Buffer, Round
from pyro_sm.objectives.importance_weighted.objective import ImportanceWeightedScoreMatching, TrainingState
from pyro_sm.objectives.importance_weighted.population import Particles
from pyro_sm.smc.local_moves import LocalMoves
from pyro_sm.training.checkpoint import read_checkpoint, write_checkpoint
from pyro_sm.training.processes import Task, num_processes, train_in_processes
from pyro_sm.training.progress import Progress, progress_bar
from pyro_sm.training.schedule import Schedule, StoppingRule, deferred_interrupt
from pyro_sm.weights import Evidence, effective_sample_size, evidence_with_tail, pareto_smooth

_NAMES = itertools.count()
_PROBE_SEED = 15_485_863  # the probe's generator is not that of training or of the draws
_MOVE_SEED = 32_452_843
_CHECKPOINT_KEYS = (
    "settings", "sites", "seed", "guide", "optimiser", "rng", "rounds", "steps", "loss_sum", "seconds", "history",
    "evaluations", "schedule", "population", "seeding",
)  # fmt: skip


def _beside(path: str | os.PathLike[str], chain: int) -> str:
    """The checkpoint of another replica."""
    return f"{os.fspath(path)}.{chain}"


def _draws_on(values: list[Tensor | None], to: dict[str, Any]) -> Draws:
    """Draws out of a checkpoint, with the dtype and device of ``to``; the score may be missing."""
    z, log_p, log_weight, *score = (None if x is None else x.to(**to) for x in values)
    if z is None or log_p is None or log_weight is None:
        raise CheckpointError("expected latents, densities and weights of every round in the checkpoint, found None")
    return Draws(z, log_p, log_weight, *score)


class _SeedingStopped(Exception):
    """Ctrl-C was noticed while a population was seeded."""


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
        replicas: one sampler per chain; the first is this one.
        probed: what the last probe of :meth:`check` has found; any guide on the same model and data can use it.

    Raises:
        ValueError: both ``base`` and ``guide`` are given, or ``num_chains`` or ``num_workers`` < 1.

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
        if num_chains < 1:
            raise ValueError(f"expected num_chains >= 1, found {num_chains}")
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"expected num_workers >= 1, found {num_workers}")
        if base is not None and guide is not None:
            raise ValueError("expected a base for the default guide, or a guide with its own base; found both")
        self.model = model
        self.guide = guide or AutoDiffusion(model, base=base, name=f"DiffusionSampler{next(_NAMES)}")
        self._untrained = copy.deepcopy(self.guide)
        self.objective = objective or ImportanceWeightedScoreMatching()
        self.stopping = stopping or StoppingRule()
        self.learning_rate = learning_rate
        self.seed = seed
        self.checkpoint = checkpoint
        self.checkpoint_every = checkpoint_every
        self.disable_progbar = disable_progbar
        self.num_workers = num_workers
        self.schedule = Schedule()
        self._optimiser: torch.optim.Adam | None = None
        self._rng: list[Tensor] | None = None
        self._running = False
        self._loaded: dict[str, Any] | None = None
        self._data: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._data_versions: tuple[int, ...] = ()
        self._pool_of_draws: Draws | None = None
        self._drawn = Evaluations()
        self._last_saved = -math.inf
        self._label = ""
        self.probe_result: ProbeResult | None = None
        self._probe_settings: Probe | None = None
        self._verdict: Verdict | None = None
        self.replicas = (self, *(self._replica(chain, num_chains) for chain in range(1, num_chains)))

    def _replica(self, chain: int, num_chains: int) -> DiffusionSampler:
        """Another sampler with these settings, and a seed, a guide and a checkpoint of its own."""
        guide = copy.deepcopy(self._untrained)
        guide._pyro_name = f"{guide._pyro_name}.replica{chain}"
        replica = DiffusionSampler(
            self.model,
            guide=guide,
            objective=copy.deepcopy(self.objective),
            stopping=self.stopping,
            learning_rate=self.learning_rate,
            seed=self.seed + chain,
            checkpoint=None if self.checkpoint is None else _beside(self.checkpoint, chain),
            checkpoint_every=self.checkpoint_every,
            disable_progbar=self.disable_progbar,
        )
        self._label, replica._label = (f"replica {c + 1}/{num_chains}" for c in (0, chain))
        return replica

    # -- running -----------------------------------------------------------------------------------------------

    @property
    def history(self) -> tuple[RoundInfo, ...]:
        """What each round measured, oldest first."""
        return self.objective.history

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
        for replica in self.replicas:
            replica.stopping = self.stopping  # whose budget may have grown since
        num_workers = num_processes(
            self.num_workers, len(self.replicas), (*args, *kwargs.values()), compiles=self.guide.compiles
        )
        if num_workers > 1:
            self._run_at_once(args, kwargs, num_workers)
        else:
            for replica in self.replicas:
                replica._run(args, kwargs)

    def _run_at_once(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_workers: int) -> None:
        """Train all replicas that are not finished, each in a process of its own."""
        for replica in self.replicas:
            with replica._own_rng():
                replica._bind(args, kwargs)
                replica._reopen_if_budget_grew()
        left = [replica for replica in self.replicas if not replica.schedule.finished]
        tasks = [Task(r._label, partial(r._run_apart, args, kwargs), r._content) for r in left]
        with deferred_interrupt() as interrupted, contextlib.ExitStack() as bars:
            lines = reversed([*enumerate(left)])  # the first is closed first, or they would end in reverse order
            shows = [bars.enter_context(replica._bar(line)) for line, replica in lines][::-1]
            outcomes = train_in_processes(tasks, num_workers, interrupted, shows)
            for replica, outcome in zip(left, outcomes, strict=True):
                if outcome.state is not None:
                    with replica._own_rng():
                        replica._become(outcome.state, replica._density())
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        if not all(replica.schedule.finished for replica in left):
            rounds = ", ".join(str(len(replica.history)) for replica in self.replicas)
            raise KeyboardInterrupt(
                f"stopped after {rounds} rounds of the replicas; run() with the same arguments goes on"
            )

    def _run_apart(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        interrupted: Callable[[], bool],
        show: Callable[[Progress], None],
    ) -> None:
        """Train this one replica, bound by its parent, in a process of its own."""
        self.replicas = (self,)  # what stands here of the others is old, and their files are theirs to write
        with self._own_rng():
            self._train(args, kwargs, interrupted, show)
        if self.schedule.finished:
            self._warn_of_nan()
        self._save_if_asked(force=True)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Train this one replica, here."""
        with self._own_rng():
            self._bind(args, kwargs)
            self._reopen_if_budget_grew()
            if self.schedule.finished:
                return
            with deferred_interrupt() as interrupted, self._bar() as show:
                self._train(args, kwargs, interrupted, show)
                if not self.schedule.finished:
                    self._save_if_asked(force=True)
                    raise KeyboardInterrupt(
                        f"stopped after {len(self.history)} rounds; run() with the same arguments goes on"
                    )
            self._warn_of_nan()
        self._save_if_asked(force=True)

    def _train(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        interrupted: Callable[[], bool],
        show: Callable[[Progress], None],
    ) -> None:
        """Steps until training ends, or until ``interrupted()``."""

        def seeding(beta: float) -> None:
            if interrupted():
                raise _SeedingStopped
            show(self._standing(f"seeding, β={beta:.2g}" if beta > 0 else "seeding, looking for modes"))

        self._pool_of_draws = None
        self.objective.on_seeding = seeding
        try:
            while not self.schedule.finished:
                with contextlib.suppress(_SeedingStopped):
                    self._step(args, kwargs, lambda info: show(self._standing()))
                if interrupted():
                    break
        finally:
            self.objective.on_seeding = None
        if self.schedule.finished:
            show(self._standing())

    @contextmanager
    def _own_rng(self) -> Iterator[None]:
        """Run on the sampler's own generator state and give the global one back untouched."""
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            if self._rng is None or self._optimiser is None:  # a run that failed before training leaves no trace
                torch.manual_seed(self.seed)
            else:
                self._set_rng_state(self._rng)
            self._running = True
            try:
                yield
            finally:
                self._running = False
                self._rng = self._rng_state()

    @staticmethod
    def _rng_state() -> list[Tensor]:
        """The state of the generators in use."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]

    @staticmethod
    def _set_rng_state(states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for device, state in enumerate(states[1 : count + 1]):
            torch.cuda.set_rng_state(state, device)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._data is not None and not (
            tensor_versions(*self._data) == self._data_versions and same_arguments(args, kwargs, *self._data)
        ):
            self._start_afresh()
        self.guide.setup(self.model, args, kwargs)
        density = self.guide.density(self.model, args, kwargs)
        self._data, self._data_versions = (args, kwargs), tensor_versions(args, kwargs)
        self.objective.bind(self.guide, density)
        if self._optimiser is None:
            weights = self.guide.network_weights.unconstrained()
            self._optimiser = torch.optim.Adam([weights], lr=self.learning_rate)
        if self._loaded is not None:
            self._restore(self._loaded, self._density())
            self._loaded = None

    def _start_afresh(self) -> None:
        """New data, new inference: what was learned for other data may have lost modes that matter here."""
        self.guide.release()  # or the store would hand the old parameters to the new guide
        self.guide = copy.deepcopy(self._untrained)
        self.objective.state = TrainingState()
        self.schedule = Schedule()
        self._drawn = Evaluations()
        self._optimiser = None
        self._pool_of_draws, self._verdict, self.probe_result = None, None, None
        torch.manual_seed(self.seed)

    def _density(self) -> ModelDensity:
        if self._data is None:
            raise ValueError("call run(...) with the model's arguments first")
        return self.guide.density(self.model, *self._data)

    def _warn_of_nan(self) -> None:
        evaluations = self._density().evaluations
        if evaluations.not_a_number:
            share = evaluations.not_a_number / max(evaluations.values, 1)
            warnings.warn(
                f"the log density was NaN at {evaluations.not_a_number} latents ({share:.1%} of those evaluated); "
                "they were taken to be impossible. If the likelihood should be finite there, the posterior is wrong",
                PyroSMWarning,
                stacklevel=3,
            )

    def _reopen_if_budget_grew(self) -> None:
        spent = self.history[-1].density_evaluations - self.objective.state.seeding if self.history else 0
        room = self.stopping.max_evaluations - spent >= self.objective.num_particles
        # As it stood when annealing began: annealing itself lifts the effective sample size again.
        ended_by_budget = not self.stopping.converged(self.history[: self.schedule.anneal_start])
        if self.schedule.finished and room and ended_by_budget and self.schedule.anneal_end < self._last_round():
            self.schedule = Schedule()

    def _last_round(self) -> int:
        """The round at which the budget is spent; the base comes out of it, the seeding of a population on top."""
        base = 0
        if self.history:
            base = self.history[0].density_evaluations - self.objective.num_particles - self.objective.state.seeding
        return max((self.stopping.max_evaluations - base) // self.objective.evaluations_per_round, 1)

    def _after_round(self) -> None:
        """Decide, once per round, whether to anneal."""
        done = len(self.history)
        last = max(self._last_round(), done)
        if self.schedule.anneal_start < 0:
            if self.stopping.converged(self.history):
                length = max(self.stopping.anneal_rounds, done // 3)
                self.schedule = Schedule(done, min(done + length, last))
            elif done >= (last + 1) // 2:
                self.schedule = Schedule(done, last)

    def _rate(self) -> float:
        """Learning rate of the step to come."""
        start, end = self.schedule.anneal_start, self.schedule.anneal_end
        if start < 0:
            return self.learning_rate
        done = len(self.history) - start + self.objective.state.steps / self.objective.steps_per_round
        return self.learning_rate * max(1 - done / (end - start + 1), 0.0)

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any], report: Callable[[RoundInfo], None]) -> None:
        """One optimiser step, and the round before it if one is due."""
        optimiser = self._optimiser
        if optimiser is None:
            raise ValueError("call run(...) first")
        rounds = len(self.history)
        for group in optimiser.param_groups:
            group["lr"] = self._rate()
        optimiser.zero_grad()
        with self._undone_if_interrupted():
            loss = self.objective.loss_and_grads(self.model, self.guide, *args, **kwargs)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss} in round {rounds}: lower the learning rate (now "
                f"{self.learning_rate}), or check the model for overflow"
            )
        torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 10.0)
        optimiser.step()
        if len(self.history) > rounds:
            report(self.history[-1])
            self._after_round()
        if self.objective.round_due():
            last = self._last_round()
            if self.schedule.anneal_start >= 0:
                last = min(last, self.schedule.anneal_end)
            ended = len(self.history) >= last
            if ended:  # before the save, so that a checkpoint that says "finished" is
                self.objective.refit(self.guide, args, kwargs)
            self.schedule = self.schedule._replace(finished=ended)
            self._save_if_asked(force=False)

    @contextmanager
    def _undone_if_interrupted(self) -> Iterator[None]:
        """Back to the state, generators and counts before, so that what was interrupted can be done again."""
        state, rng, counted = self.objective.state, self._rng_state(), self._density().evaluations
        before = astuple(counted)
        try:
            yield
        except (KeyboardInterrupt, _SeedingStopped):
            self.objective.state = state
            self._set_rng_state(rng)
            counted.values, counted.scores, counted.not_a_number = before
            raise

    def _bar(self, line: int | None = None) -> contextlib.AbstractContextManager[Callable[[Progress], None]]:
        return progress_bar(self._label, self._standing(), disable=self.disable_progbar, position=line)

    def _standing(self, doing: str = "training") -> Progress:
        """Where training stands, to be shown."""
        budget = self.stopping.max_evaluations + self.objective.state.seeding
        if not self.history:
            return Progress(0, budget, doing)
        info = self.history[-1]
        spent = info.density_evaluations
        figures = (
            f"round {info.round}, γ={info.gamma:.2f}, ESS={info.ess:.2f}, k̂={info.khat:.2f}, "
            f"log Z={info.log_evidence:.2f}±{info.log_evidence_se:.2f}"
        )
        return Progress(spent, spent if self.schedule.finished else budget, doing, figures)

    # -- draws -------------------------------------------------------------------------------------------------

    def draws(self, num_draws: int) -> Draws:
        """At least ``num_draws`` weighted draws, kept for later calls; the guide's own come first.

        See :meth:`~pyro_sm.AutoDiffusion.draw_weighted`: the last tenth is the covering component's. Of several
        replicas, as many of each, one after the other.
        """
        each = -(-num_draws // len(self.replicas))
        pools = [replica._draws(each) for replica in self.replicas]
        if len(pools) == 1:
            return pools[0]
        size = max(len(pool.z) for pool in pools)  # one of them may have been asked for more by itself
        return joined([replica._draws(size) for replica in self.replicas])

    def _draws(self, num_draws: int) -> Draws:
        """Of this one replica."""
        if self._pool_of_draws is None or self._pool_of_draws.z.shape[0] < num_draws:
            density = copy.copy(self._density())
            density.evaluations = self._drawn  # apart from those of training, which has a budget
            args, kwargs = self._data or ((), {})
            with torch.random.fork_rng():
                torch.manual_seed(self.seed + 7919)
                self._pool_of_draws = self.guide.draw_weighted(
                    density, num_draws, args, kwargs, covering=self.objective.covering
                )
        return self._pool_of_draws

    def _pool(self, num_samples: int = 4000) -> Draws:
        return self.draws(max(4 * num_samples, 16_000))

    def _generator(self) -> torch.Generator:
        return torch.Generator(device=self._density().device).manual_seed(self.seed)

    def _correction(self, correction: Correction | None) -> Correction:
        correction = correction or ImportanceResampling()
        return correction if len(self.replicas) == 1 else PerReplica(correction, len(self.replicas))

    def _counted(self) -> Evaluations:
        """Of training, and of the draws since, by all replicas."""
        trained = [replica._density().evaluations for replica in self.replicas]
        spent = [*trained, *(replica._drawn for replica in self.replicas)]
        return sum(spent, Evaluations())

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
        pool = self._pool(num_samples)
        index = self._correction(correction).apply(pool, num_samples, self._generator())
        density = self._density()
        z = pool.z[index]
        if moves is not None:
            counting = copy.copy(density)
            counting.evaluations = self._drawn
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
        looks for what it has lost (see ``diagnostics/probe.py``); its evaluations are counted apart, in
        ``verdict.findings``. What it found is kept for the next call. Ctrl-C leaves everything as it was.

        Args:
            probe: how to look elsewhere; what an earlier look has found; or None not to look.
            correction: that you use for draws: of :class:`~pyro_sm.corrections.IndependentMetropolis` the acceptance
                is judged.
            stein_draws: of the kernel Stein test, 0 for none; each costs a gradient evaluation.
            thresholds: where the lines are drawn.

        Raises:
            ValueError: nothing has been run yet.
        """
        pool, density = self._pool(), copy.copy(self._density())
        density.evaluations = Evaluations()
        findings = training_findings(pool_findings(pool.log_weight), pool.log_weight, self.history)
        if isinstance(correction, IndependentMetropolis):
            accepted = correction.walk(pool.log_weight, self._generator()).acceptance
            findings = replace(findings, acceptance=float(accepted.mean()))
        if len(self.replicas) > 1:
            index = self._correction(None).apply(pool, 1000 * len(self.replicas), self._generator())
            findings = chain_findings(findings, [pool.z[index].unflatten(0, (len(self.replicas), 1000))])
        with isolated_rng(self.seed + _PROBE_SEED):
            findings = stein_findings(findings, density, pool.z, pool.log_weight, stein_draws)
            if probe is not None:
                findings = self._probe(findings, pool, probe, density, thresholds)
        self._verdict = judge(findings, thresholds)
        return self._verdict

    def _probe(
        self,
        findings: Findings,
        pool: Draws,
        probe: Probe | ProbeResult,
        density: ModelDensity,
        thresholds: Thresholds | None,
    ) -> Findings:
        """``findings`` with what a probe found, and what each replica would have said of its particles."""
        args, kwargs = self._data or ((), {})
        with torch.no_grad(), poutine.block():
            processes = [replica.guide.diffusion(args, kwargs) for replica in self.replicas]
            if isinstance(probe, Probe):
                if self.probe_result is None or self._probe_settings != probe:
                    with probe_progress(self.disable_progbar) as report:
                        start = start_for(density, processes[0].covering_gaussian)
                        self.probe_result = look_elsewhere(probe, density, start, pool.log_weight, thresholds, report)
                    self._probe_settings = probe
                probe = self.probe_result
            covering = self.objective.covering or default_covering(density)
            weights = [process_log_weight(p, density, covering, probe.z, probe.log_p) for p in processes]
        return probe_findings(findings, pool.log_weight, probe, weights)

    def to_arviz(self, num_samples: int = 4000, *, correction: Correction | None = None, **options: Any) -> Any:
        """``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x); see ``diagnostics/export.py`` for ``options``.

        With the verdict, if :meth:`check` was called; of several replicas every chain is one.
        """
        pool, counted = self._pool(num_samples), self._counted()
        provenance = Provenance(type(self.objective).__name__, self.seed, counted.values, counted.scores)
        if len(self.replicas) > 1:
            options.setdefault("num_chains", len(self.replicas))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return draws_to_arviz(
                self._density(),
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
        """Evidence, weights and cost, a line each; straightened coordinates and the verdict, where there are any."""
        counted = self._counted()
        rounds = sum(len(replica.history) for replica in self.replicas)
        seconds = sum(replica.history[-1].seconds for replica in self.replicas)
        lines = (
            f"log evidence  {self.log_evidence:.3f} ± {self.log_evidence_se:.3f} nats\n"
            f"weights       Pareto k̂ {self.khat:.2f} (trust below 0.7), effective share {self.ess:.2f}\n"
            f"cost          {counted.values} density and {counted.scores} gradient "
            f"evaluations ({self._density().batching_method}), {rounds} rounds, {seconds:.0f} s of training"
        )
        if self.guide.drivers():
            lines += f"\ncoordinates   a funnel is straightened, driven by {', '.join(self.guide.drivers())}"
        return lines if self._verdict is None else f"{lines}\n{self._verdict}"

    def summary(self, num_samples: int = 4000) -> None:
        """Print evidence, weights, cost, and ArviZ's summary table of the corrected draws."""
        idata = self.to_arviz(num_samples, predictive=False, log_likelihood=False, prior=False)
        print(f"{self.report()}\n{summary_table(idata)}")

    # -- saving ------------------------------------------------------------------------------------------------

    def _save_if_asked(self, *, force: bool) -> None:
        if self.checkpoint is None:
            return
        if force or time.monotonic() - self._last_saved > self.checkpoint_every:
            self.save(self.checkpoint)
            self._last_saved = time.monotonic()

    def _settings(self) -> dict[str, str]:
        """What must be equal for a resumed run to go on as it would have."""
        objective = self.objective
        return {
            "levels": repr(self.guide.levels),
            "num_steps": repr(self.guide.num_steps),
            "architecture": repr(self.guide.architecture),
            "network dtype": str(self.guide.network_dtype),
            "heavy": repr(self.guide.heavy),
            "weighting": repr(objective.weighting),
            "covering": repr(objective.covering),
            "num_particles": repr(objective.num_particles),
            "steps_per_round": repr(objective.steps_per_round),
            "effective_share": repr(objective.effective_share),
            "buffer_rounds": repr(objective.buffer_rounds),
            "batch_size": repr(objective.batch_size),
            "population": repr(objective.population),
            "learning_rate": repr(self.learning_rate),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole state to ``path``, atomically; a later :meth:`load` and :meth:`run` continue from it.

        Replicas that have begun are written beside it, with ``.1``, ``.2``, … at the end of the name.

        Raises:
            CheckpointError: the file cannot be written.
            ValueError: nothing has been run yet.
        """
        if self._optimiser is None:
            raise ValueError("there is nothing to save: call run(...) first")
        self._save(path)
        for chain, replica in enumerate(self.replicas[1:], 1):
            if replica._optimiser is not None:
                replica._save(_beside(path, chain))

    def _save(self, path: str | os.PathLike[str]) -> None:
        """Write the state of this one replica."""
        write_checkpoint(path, self._content())

    def _content(self) -> dict[str, Any]:
        """The state of this one replica."""
        if self._optimiser is None:
            raise ValueError("there is nothing to save: call run(...) first")
        state, density = self.objective.state, self._density()
        rounds = [
            {"draws": list(r.draws), "weight": r.weight, "gamma": r.gamma, "num_guide": r.num_guide}
            for r in state.buffer.rounds
        ]
        rng = self._rng_state() if self._running or self._rng is None else self._rng
        return {
            "settings": self._settings(),
            "sites": {site.name: list(site.unconstrained_shape) for site in density.sites},
            "seed": self.seed,
            "guide": {k: v.detach() for k, v in self.guide.state_dict().items()},
            "optimiser": self._optimiser.state_dict(),
            "rng": rng,
            "rounds": rounds,
            "steps": state.steps,
            "loss_sum": state.loss_sum,
            "seconds": state.seconds,
            "population": None if state.population is None else list(state.population),
            "seeding": state.seeding,
            "history": [list(info) for info in state.history],
            "evaluations": list(astuple(density.evaluations)),
            "schedule": list(self.schedule),
        }

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read a state written by :meth:`save`; the next :meth:`run` checks that model and data are the same.

        Raises:
            CheckpointError: the file is missing, damaged, or was made with other settings.
        """
        self._load(path)
        for chain, replica in enumerate(self.replicas[1:], 1):
            if os.path.exists(_beside(path, chain)):
                replica._load(_beside(path, chain))
                if replica.seed != self.seed + chain:
                    raise CheckpointError(
                        f"expected the seed {self.seed + chain} in '{_beside(path, chain)}', found {replica.seed}: "
                        "it belongs to another run"
                    )
            else:  # stopped before its turn
                replica.seed = self.seed + chain

    def _load(self, path: str | os.PathLike[str]) -> None:
        """The state of this one replica."""
        content = read_checkpoint(path)
        missing = [key for key in _CHECKPOINT_KEYS if key not in content]
        if missing:
            raise CheckpointError(
                f"'{path}' is not a checkpoint of a DiffusionSampler (missing: {', '.join(missing)})"
            )
        mine, theirs = self._settings(), content["settings"]
        different = [f"{k}: {theirs.get(k)} there, {v} here" for k, v in mine.items() if theirs.get(k) != v]
        if different:
            raise CheckpointError(f"'{path}' was made with other settings ({'; '.join(different)})")
        self._loaded = content
        self._verdict = None
        self.seed = content["seed"]

    def _restore(self, content: dict[str, Any], density: ModelDensity) -> None:
        sites = {site.name: list(site.unconstrained_shape) for site in density.sites}
        if content["sites"] != sites:
            raise CheckpointError(f"the checkpoint belongs to a model with the sites {content['sites']}, not {sites}")
        self._check_data(self._rounds(content, density), density)
        self._become(content, density)

    @staticmethod
    def _rounds(content: dict[str, Any], density: ModelDensity) -> tuple[Round, ...]:
        to = {"dtype": density.dtype, "device": density.device}
        return tuple(
            Round(_draws_on(r["draws"], to), r["weight"].to(**to), r["gamma"], r["num_guide"])
            for r in content["rounds"]
        )

    def _become(self, content: dict[str, Any], density: ModelDensity) -> None:
        """Take over a state of this model on these data, generators included."""
        to = {"dtype": density.dtype, "device": density.device}
        self._pool_of_draws = None
        self.guide.load_state_dict(content["guide"])
        if self._optimiser is not None:
            self._optimiser.load_state_dict(content["optimiser"])
        history = tuple(RoundInfo(*info) for info in content["history"])
        self.objective.state = TrainingState(
            Buffer(self._rounds(content, density)),
            content["steps"],
            content["loss_sum"],
            history,
            content["seconds"],
            None if content["population"] is None else Particles(*(x.to(**to) for x in content["population"])),
            content["seeding"],
        )
        self.schedule = Schedule(*content["schedule"])
        counted = Evaluations(*content["evaluations"])
        density.evaluations.values, density.evaluations.scores = counted.values, counted.scores
        density.evaluations.not_a_number = counted.not_a_number
        self._set_rng_state(content["rng"])

    def _check_data(self, rounds: tuple[Round, ...], density: ModelDensity) -> None:
        """The density of a few saved draws must come out as it was saved: else model or data have changed."""
        if not rounds:
            return
        z, then = rounds[-1].draws.z[:4], rounds[-1].draws.log_p[:4]
        now = density.log_prob(z)
        if not torch.allclose(now, then, rtol=1e-5, atol=1e-2, equal_nan=True):
            raise CheckpointError(
                "the checkpoint was made with other data or another version of the model: log densities of its "
                f"draws were {[round(float(x), 3) for x in then]}, now {[round(float(x), 3) for x in now]}"
            )
