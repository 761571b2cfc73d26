# SPDX-License-Identifier: Apache-2.0
r"""Targets with known answers, each method on each, every figure beside that of as many exact draws.

``python -m pyro_sm bench targets --targets gmm40 funnel --methods iwsm smc nuts --evaluations 100000 --out F.jsonl``:
one row per target, method and seed, appended to the file as it ends; ``bench report`` makes tables and pictures of
it. A row that is in the file is not run again; a method that fails leaves a row with its reason.

Figures, all of the equally weighted draws a method ends with (weighted pools are resampled first):

* *modes*: cells that got more than a tenth of their probability; *mode TV*: ``½ Σ_k |ŵ_k − w_k|``;
* *W2*: exact optimal transport between 1000 draws and 1000 exact draws (mixtures of Gaussians);
* *v sd error*: ``|sd(v) − 3|`` (funnel); *minority error*: error of the mean share in the lighter well (Many-Well);
* *configuration error*: worst error of a configuration's weight; *mean error*: worst error of a marginal mean, in
  reference standard deviations (sensor network);
* *virial error*: ``|E[z · ∇E]/D − 1|``; *aligned W2* and *energy W2*: to reference draws (particles).

Their *floor* is the mean of the same figure over sets of exact draws (or reference draws) as large as the method's;
there is none where neither are known. Beside them: the error of ``log Z`` (nats), the effective share and k̂ of the
pool, evaluations and CPU seconds of training and of drawing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_sm.bench.rows import Row, machine, read, resumed
from pyro_sm.bench.target_methods import METHODS, Budget, Fit, Method
from pyro_sm.density import value_and_score
from pyro_sm.targets import (
    DoubleWellParticles,
    Funnel,
    GaussianMixture,
    GaussianShells,
    HasDraws,
    HasModes,
    LennardJones,
    ManyWell,
    PhiFour,
    Rings,
    SensorNetwork,
    Target,
    UnequalModes,
)
from pyro_sm.targets.metrics import (
    aligned_wasserstein2,
    energy_wasserstein,
    mode_total_variation,
    wasserstein2,
)
from pyro_sm.weights import effective_sample_size, pareto_smooth

Particles = DoubleWellParticles | LennardJones

TARGETS: dict[str, Callable[[], Target]] = {
    "gmm40": GaussianMixture,
    "gmm80": lambda: GaussianMixture(80),
    "gmm120": lambda: GaussianMixture(120),
    "gmm40-10d": lambda: GaussianMixture(40, dim=10, scale=1.0),
    "gmm40-50d": lambda: GaussianMixture(40, dim=50, scale=1.0),
    "many-well-2": lambda: ManyWell(2),
    "many-well-8": lambda: ManyWell(8),
    "many-well-16": lambda: ManyWell(16),
    "many-well-32": lambda: ManyWell(32),
    "many-well-64": lambda: ManyWell(64),
    "many-well-128": lambda: ManyWell(128),
    "many-well-200": lambda: ManyWell(200),
    "unequal-8": UnequalModes,
    "funnel": Funnel,
    "rings": Rings,
    "shells-2": GaussianShells,
    "shells-5": lambda: GaussianShells(5),
    "shells-10": lambda: GaussianShells(10),
    "phi4-32": PhiFour,
    "sensor": SensorNetwork,
    "dw4": DoubleWellParticles,
    "lj13": LennardJones,
    "lj55": lambda: LennardJones(55),
}
"""The targets by the names of the command line."""

_MOST_MODES = 1024
_TRANSPORTED = 1000
_FLOOR_SETS = 3
_STORED = 2000
_EXACT_SEED = 2  # of the exact draws that distances are taken to; floors have the seeds above
_VIRIAL_CHUNK = 2000


# ------------------------------------------------------------------------------------------------------- figures


class Truth(NamedTuple):
    """What draws are compared with.

    ``target``: the target. ``reference``: (M, D) draws from elsewhere, for targets without exact ones, or None.
    ``particle_draws``: how many draws the distances of particles use, at most half of the reference; time grows with
    their square.
    """

    target: Target
    reference: Tensor | None = None
    particle_draws: int = 2000

    def exact(self, num_draws: int, which: int) -> Tensor | None:
        """The ``which``-th independent set of exact or reference draws (num_draws, D); None if there is none."""
        if isinstance(self.target, HasDraws):
            return self.target.sample(num_draws, torch.Generator().manual_seed(_EXACT_SEED + which))
        if self.reference is None or (which + 1) * num_draws > len(self.reference):
            return None
        return self.reference[which * num_draws : (which + 1) * num_draws]


def _some(x: Tensor, num_draws: int) -> Tensor:
    """A random choice: draws may be in the order of their chains."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:num_draws].to(x.device)]


def _mode_figures(target: HasModes, x: Tensor) -> dict[str, float]:
    try:
        weights = target.mode_weights()
    except ValueError:  # too many to list
        return {}
    if len(weights) > _MOST_MODES:
        return {}
    shares = target.mode_shares(x)
    found = int((shares > 0.1 * weights.to(shares)).sum())
    return {"modes": found, "mode TV": mode_total_variation(shares, weights)}


def _virial_error(target: Target, x: Tensor) -> float:
    products = [(z * value_and_score(target.log_prob, z)[1]).sum(-1) for z in x.split(_VIRIAL_CHUNK)]
    return abs(-float(torch.cat(products).double().mean()) / target.dim - 1)


def _particle_figures(target: Particles, x: Tensor, truth: Truth) -> dict[str, float]:
    found = {"virial error": _virial_error(target, x)}
    if truth.reference is not None:
        # Half at most, so that the floor can be of as many.
        x = _some(x, min(truth.particle_draws, len(truth.reference) // 2))
        exact = truth.reference[: len(x)]
        first, second = target.particles.to_positions(x), target.particles.to_positions(exact.to(x))
        found["aligned W2"] = aligned_wasserstein2(first, second, target.particles.space_dim)
        found["energy W2"] = energy_wasserstein(target.energy(first), target.energy(second))
    return found


def figures(truth: Truth, x: Tensor) -> dict[str, float]:
    """The figures of draws ``x`` (N, D) that this target has; see the head of this file."""
    target = truth.target
    found = _mode_figures(target, x) if isinstance(target, HasModes) else {}
    if isinstance(target, GaussianMixture):
        some = _some(x, _TRANSPORTED)
        exact = truth.exact(len(some), 0)
        if exact is not None:
            found["W2"] = wasserstein2(some, exact)
    if isinstance(target, Funnel):
        found["v sd error"] = abs(target.found_v_sd(x) - target.v_sd)
    if isinstance(target, ManyWell):
        found["minority error"] = abs(target.minority_share(x) - (1 - target.right_weight))
    if isinstance(target, SensorNetwork):
        weights = target.mode_weights()
        found["configuration error"] = float((target.mode_shares(x) - weights.to(x)).abs().max())
        off = (x.mean(0) - target.reference_mean.to(x)) / target.reference_sd.to(x)
        found["mean error"] = float(off.abs().max())
    if isinstance(target, Particles):
        found |= _particle_figures(target, x, truth)
    return found


def floor(truth: Truth, num_draws: int) -> dict[str, float]:
    """Mean :func:`figures` of sets of ``num_draws`` exact draws; empty if there are none.

    Three sets where draws are exact; of reference draws one, of half of them if they are no more than twice as many.
    """
    sets = _FLOOR_SETS if isinstance(truth.target, HasDraws) else 1
    if truth.reference is not None:
        num_draws = min(num_draws, len(truth.reference) // 2)
    drawn = [truth.exact(num_draws, 1 + i) for i in range(sets)]
    rows = [figures(truth, x) for x in drawn if x is not None]
    return {key: sum(row[key] for row in rows) / len(rows) for key in (rows[0] if rows else ())}


# ---------------------------------------------------------------------------------------------------- measuring


def _weight_figures(target: Target, fit: Fit) -> dict[str, float]:
    found: dict[str, float] = {}
    if fit.log_evidence is not None and target.log_evidence is not None:
        found["log Z error"] = fit.log_evidence - target.log_evidence
    if fit.log_evidence_se is not None:
        found["log Z se"] = fit.log_evidence_se
    if fit.log_weight is not None:
        found["ESS"] = effective_sample_size(fit.log_weight) / fit.log_weight.shape[0]
        found["khat"] = pareto_smooth(fit.log_weight).khat
    return found


class Judged(NamedTuple):
    """A row of the results, and the samples (n, d) that it is about; None if the method failed."""

    row: Row
    samples: Tensor | None


def measure(
    key: dict[str, Any], truth: Truth, method: Method, floors: dict[tuple[str, int], dict[str, float]]
) -> Judged:
    """Run a method and compare with the truth.

    Args:
        key: what identifies the row: target, method, seed, evaluations, draws.
        truth: of the target.
        method: the method.
        floors: those known so far, by target and number of draws; new ones are added.
    """
    started = time.process_time()
    row = {**key, "dim": truth.target.dim, "machine": machine()}
    try:
        fit = method.fit(truth.target, key["seed"], Budget(key["evaluations"], key["draws"]))
        x = fit.samples.detach()
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{int((~torch.isfinite(x)).any(1).sum())} of {len(x)} draws are not finite")
        place = (key["target"], len(x))
        if place not in floors:
            floors[place] = floor(truth, len(x))
        row |= {
            "samples": len(x),
            "figures": figures(truth, x),
            "floor": floors[place],
            **_weight_figures(truth.target, fit),
            "training": fit.training._asdict(),
            "drawing": fit.drawing._asdict(),
            "note": fit.note,
        }
        return Judged(row, x)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Judged({**row, "failed": reason, "CPU s": time.process_time() - started}, None)


# -------------------------------------------------------------------------------------------------- command line

KEYS = ("target", "method", "seed", "evaluations", "draws")
"""What identifies a row."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; none if there is no file.

    Raises:
        ValueError: a line is not a row of these results.
    """
    try:
        rows = read(path)
    except json.JSONDecodeError as error:
        raise ValueError(f"a line of '{path}' is not JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise ValueError(f"line {number} of '{path}' is no row of bench targets: it lacks {', '.join(missing)}")
    return rows


def draws_path(out: Path, row: Row) -> Path:
    """Where up to 2000 of a row's draws are kept, beside the results."""
    name = "--".join(str(row[key]) for key in KEYS)
    return out.with_name(f"{out.stem}-draws") / f"{name}.npz"


def _store_draws(out: Path, judged: Judged) -> None:
    """Before its row, so that a row that is in the file has them."""
    if judged.samples is not None:
        path = draws_path(out, judged.row)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, samples=_some(judged.samples, _STORED).cpu().numpy())


def reference_draws(folder: Path | None, name: str, target: Target) -> Tensor | None:
    """``latents`` (M, D) of ``NAME.npz``, or else those shipped with the package; None if there are neither.

    In random order, so that any slice is as good as another.

    Raises:
        ValueError: the array is not there, or of another shape.
    """
    if folder is None or not (folder / f"{name}.npz").is_file():
        try:
            return target.reference_draws() if isinstance(target, Particles) else None
        except ValueError:  # none of this size are shipped
            return None
    with np.load(folder / f"{name}.npz") as content:
        if "latents" not in content:
            raise ValueError(f"expected the array 'latents' in '{folder / name}.npz', found {', '.join(content)}")
        latents = torch.as_tensor(content["latents"]).to(target.start.loc)
    if latents.ndim != 2 or latents.shape[1] != target.dim:
        raise ValueError(f"expected latents of shape (M, {target.dim}), found {tuple(latents.shape)}")
    return _some(latents, len(latents))


def line(row: Row) -> str:
    """A row in words, floors in brackets."""
    head = f"{row['target']}, {row['method']}, seed {row['seed']}"
    if "failed" in row:
        return f"{head}: failed: {row['failed']}"
    parts = []
    for key, value in row["figures"].items():
        bound = row["floor"].get(key, math.nan)
        parts.append(f"{key} {value:.3g}" + ("" if math.isnan(bound) else f" ({bound:.3g})"))
    parts += [f"{key} {row[key]:.3g}" for key in ("log Z error", "ESS", "khat") if key in row]
    spent = max(row["training"]["density"], row["training"]["gradient"])
    seconds = row["training"]["seconds"] + row["drawing"]["seconds"]
    return f"{head}: {', '.join(parts)}; {spent:,} evaluations, {seconds:.1f} CPU s; {row['note']}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench targets``."""
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluations", type=int, default=100_000, help="of training (default %(default)s)")
    parser.add_argument("--draws", type=int, default=10_000, help="usable draws per fit (default %(default)s)")
    parser.add_argument("--particle-draws", type=int, default=2000, help="in distances (default %(default)s)")
    parser.add_argument(
        "--references",
        type=Path,
        metavar="DIR",
        help="with TARGET.npz: an array 'latents' (M, D), instead of the package's own",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="rows in it are not repeated")


def _check(options: argparse.Namespace) -> None:
    for name, wanted, known in (("targets", options.targets, TARGETS), ("methods", options.methods, METHODS)):
        unknown = [one for one in wanted if one not in known]
        if unknown:
            raise ValueError(f"--{name}: expected some of {', '.join(known)}, found {' '.join(unknown)}")
    for name in ("evaluations", "draws", "particle_draws"):
        if getattr(options, name) < 1:
            raise ValueError(f"expected --{name.replace('_', '-')} >= 1, found {getattr(options, name)}")
    if not options.out.parent.is_dir():
        raise ValueError(f"there is no folder '{options.out.parent}' for --out")


def _notes(name: str, truth: Truth) -> None:
    if isinstance(truth.target, Particles) and truth.reference is None:
        print(f"{name}: no aligned W2 and no energy W2, for want of reference draws (--references)", flush=True)


def run(options: argparse.Namespace) -> None:
    """Run what is asked for, a line as each ends."""
    _check(options)
    read_rows(options.out)  # refuses a file of something else
    print(machine())
    floors: dict[tuple[str, int], dict[str, float]] = {}
    truths: dict[str, Truth] = {}

    def keys() -> Iterator[Row]:
        for name in options.targets:
            target = TARGETS[name]()
            truths[name] = Truth(target, reference_draws(options.references, name, target), options.particle_draws)
            _notes(name, truths[name])
            for seed in options.seeds:
                for method in options.methods:
                    yield dict(zip(KEYS, (name, method, seed, options.evaluations, options.draws), strict=True))

    def measured(key: Row) -> Row:
        judged = measure(key, truths[key["target"]], METHODS[key["method"]], floors)
        _store_draws(options.out, judged)
        return judged.row

    total = len(options.targets) * len(options.seeds) * len(options.methods)
    for count, row in enumerate(resumed(keys(), measured, options.out), 1):
        print(f"[{count}/{total}] {line(row)}", flush=True)
