# SPDX-License-Identifier: Apache-2.0
r"""Which latents drive others, and the coupling that draws ask for: maximum likelihood, row by row.

Symbols as in ``coupling.py``. For equally weighted draws ``z`` (N, D) and given drivers, each driven latent has a
likelihood of its own, and a row of parameters ``(c, C, a_0, B, y, log κ)``, ``2k + 4`` numbers for ``k`` drivers:

    ``cost_i = mean[½ ((z_i − μ_i(h)) / σ_i(h))² + log σ_i(h)]``   (nats, less a constant),

brought down by damped Fisher scoring from two beginnings, little data and as much as prior, since it has local
minima. Drivers are found one at a time: the first by the mean log likelihood (nats per draw) that a log scale linear
in it would explain, the next also by correlation; each has to lower the entropy of the non-centred draws by more
than its parameters would by chance. ``d`` parameters too many gain ``d / (2N)`` nats per draw on average (twice the
log likelihood ratio is χ² with d degrees of freedom); twice that is asked for.

Source: "The Large-Sample Distribution of the Likelihood Ratio for Testing Composite Hypotheses"
https://doi.org/10.1214/aoms/1177732360 ; "A method for the solution of certain non-linear problems in
least squares" https://doi.org/10.1090/qam/10666 (damping).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_sm.diffusion.coupling import Coupling, Law, driven_law

# Of Fisher scoring, and of trials that only have to tell beginnings and drivers apart. Of 72 fits to draws of
# funnels half are at rest after two steps; after 12, nine in ten are within .08 nats a draw of where 60 lead, little
# beside the gain that is asked for.
_FISHER_STEPS, _TRIAL_STEPS = 60, 12
_NEWTON_STEPS = 20  # convex in every row, and right to begin with but for noise: digits double with every step
# Over N: gains of one latent by another that chance makes. One parameter too many has 2N · gain of the law χ²₁, which
# is above 10 once in 600.
_NOISE = 5.0
# log κ of latents without a likelihood of their own: beside a prior of unit size e^−40 is nothing in float64 (e^−36).
_NO_DATA = -40.0
# Log of the likelihood's precision over the prior's, to begin a fit at: next to no data, and as much as prior.
_STARTS = (-12.0, 0.0)
# Least log scale and greatest log precision of latents of unit size, the same sd of 3e-7: several hundred roundings
# of float64 away from none, and narrower than draws in float32 can be.
_NARROW, _SHARP = -15.0, 30.0
_FIRST_DAMPING = 1e-2  # nearly a full step: beginnings are regressions, good but for what they leave out
# Needed, and per latent: two more draws than a row has parameters with one driver, and then some. Of forty sets of
# normal draws in 3 or 10 latents none shows a driver, with a quarter of these neither: it is a margin.
_DRAWS = (10, 4)
_AT_REST = 1e-4  # nats per draw and step, of all rows: far below what decides between drivers, and between beginnings
_OWN = 4  # parameters of a driven latent beside those for each driver: c, a_0, y and κ
_LOOKED_AT = 16  # latents that may be drivers, each at the cost of a regression of all the others
# Draws times latents that drivers are tried with, and that a coupling is fitted to in the end; fewest draws. A step
# costs draws × latents × (2k + 4)²: a trial takes a quarter of a second of one core, and there are a dozen or so.
_TRIED, _FITTED, _FEWEST = 2**16, 2**17, 512
_FIRST = 8  # latents that are tried as the first driver: of a hierarchy, the others hide which it is
_CORRELATED = 3  # latents that are tried as the next driver for their correlation: the gain by scales names one more


def _log_volume(x: Tensor) -> float:
    """``½ log det`` of the covariance of ``x`` (N, D)."""
    covariance = torch.atleast_2d(torch.cov(x.T, correction=0))
    tiny = 1e-12 * covariance.diagonal().clamp(min=1e-300)
    return 0.5 * float(torch.linalg.slogdet(covariance + torch.diag(tiny))[1])


def entropy(z: Tensor, coupling: Coupling | None) -> float:
    """Entropy (nats, less a constant) of the best normal law of non-centred latents, for draws ``z`` (N, D).

    The lower, the better it fits: minus the mean log density of the draws under it.
    """
    if coupling is None:
        return _log_volume(z.double())
    coupling = Coupling(*(part.double() for part in coupling))
    v = coupling.to_noncentred(z.double())
    return _log_volume(v) + float(coupling.log_det(v).mean())


def _residuals(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals (N, D) of linear regressions of ``x`` (N, D) on ``h`` (N, k) and 1, and coefficients (k + 1, D)."""
    design = torch.cat([torch.ones_like(h[:, :1]), h], 1)
    found = torch.linalg.lstsq(design, x).solution
    return x - design @ found, found


def _gains(x: Tensor) -> Tensor:
    """Nats per draw by which each latent alone, as a driver, explains the scale of each other: (drivers, D).

    ``x``: (N, D), of zero mean and unit size.

    ``½ log mean(e²) − ½ log mean(e² exp(−2 b h))``, ``e`` the residual of a linear regression on ``h``, ``b`` half
    the slope of ``log e²``. Only for the latents that go with the others' ``log x²``; zero for the rest.
    """
    found = x.new_zeros(x.shape[1], x.shape[1])
    linear = x.T @ x / len(x)
    log_square = (x.square() + 1e-300).log()
    log_square = (log_square - log_square.mean(0)) / log_square.std(0).clamp(min=1e-150)
    together = (x.T @ log_square / len(x)).square()
    together.fill_diagonal_(0.0)
    for j in together.sum(1).topk(min(_LOOKED_AT, x.shape[1])).indices.tolist():
        h = x[:, j]
        square = (x - h[:, None] * linear[j]).square() + 1e-300
        slope = 0.5 * (h @ square.log()) / len(x)
        tilted = square * torch.exp(-2 * h[:, None] * slope)
        found[j] = 0.5 * (square.mean(0).log() - tilted.mean(0).log())
        found[j, j] = 0.0
    return torch.where(found > _NOISE / len(x), found, 0.0)


class _Parts(NamedTuple):
    """What is fitted, a row for each driven latent: ``c`` (D,), ``C`` (D, k), ``a_0``, ``B``, ``y``, ``log κ``."""

    loc: Tensor
    shift: Tensor
    log_scale: Tensor
    slope: Tensor
    data: Tensor
    log_precision: Tensor

    def law(self, h: Tensor) -> Law:
        """Given drivers (N, k)."""
        return driven_law(
            self.loc + h @ self.shift.T, self.log_scale + h @ self.slope.T, self.data, self.log_precision
        )

    def cost(self, x: Tensor, h: Tensor) -> Tensor:
        """Mean negative log likelihood (D,) of ``x`` (N, D), nats, less a constant."""
        law = self.law(h)
        return (0.5 * ((x - law.mean) * torch.exp(-law.log_sd)).square() + law.log_sd).mean(0)

    def packed(self) -> Tensor:
        """(D, 2k + 4)."""
        return torch.cat([p if p.ndim == 2 else p[:, None] for p in self], 1)


def _unpacked(packed: Tensor) -> _Parts:
    k = (packed.shape[1] - 4) // 2
    loc, shift, log_scale, slope, data, log_precision = packed.split([1, k, 1, k, 1, 1], 1)
    return _Parts(loc[:, 0], shift, log_scale[:, 0], slope, data[:, 0], log_precision[:, 0])


def _fisher_step(parts: _Parts, x: Tensor, h: Tensor, damping: Tensor) -> Tensor:
    """A damped step of Fisher scoring in every row, packed."""
    law = parts.law(h)
    design = torch.cat([torch.ones_like(h[:, :1]), h], 1)
    w, precise = law.weight.T[..., None], torch.exp(-law.log_sd).T[..., None]  # (D, N, 1)
    turn = w * (1 - w) * law.gap.T[..., None]
    by_mean = precise * torch.cat([w * design, -2 * turn * design, 1 - w, -turn], -1)  # (D, N, 2k + 4)
    by_log_sd = torch.cat([torch.zeros_like(w * design), w * design, torch.zeros_like(w), -0.5 * (1 - w)], -1)
    residual = (x - law.mean).T[..., None] * precise
    slope = (residual * by_mean - (1 - residual.square()) * by_log_sd).mean(1)
    information = (by_mean.mT @ by_mean + 2 * (by_log_sd.mT @ by_log_sd)) / len(x)
    held = damping[:, None] * information.diagonal(dim1=-2, dim2=-1) + 1e-9
    return torch.linalg.solve(information + torch.diag_embed(held), slope[..., None])[..., 0].clamp(-2, 2)


def _climbed(parts: _Parts, x: Tensor, h: Tensor, num_steps: int) -> tuple[_Parts, Tensor]:
    """The nearest maximum of the likelihood, row by row, and its cost (D,)."""
    cost = parts.cost(x, h)
    damping = torch.full_like(cost, _FIRST_DAMPING)
    for _ in range(num_steps):
        tried = _unpacked(parts.packed() + _fisher_step(parts, x, h, damping))
        tried = tried._replace(
            log_scale=tried.log_scale.clamp(min=_NARROW),
            log_precision=tried.log_precision.clamp(_NO_DATA, _SHARP),
        )
        new = tried.cost(x, h)
        better = new <= cost
        gain = float(torch.where(better, cost - new, 0.0).sum())
        parts = _unpacked(torch.where(better[:, None], tried.packed(), parts.packed()))
        cost = torch.where(better, new, cost)
        damping = torch.where(better, damping / 3, damping * 10).clamp(1e-6, 1e6)
        if bool((better | (damping > 1)).all()) and gain < _AT_REST:  # not for the rows whose step was too long
            break
    return parts, cost


def _log_scales(square: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """``a_0`` (D,) and ``B`` (D, k) that minimise ``½ log mean(e² exp(−2 B h))``, convex in every row.

    By Newton steps, halved where they overshoot, from the regression of ``½ log e²``, which is right already but for
    its noise; ``square``: ``e²`` (N, D).
    """
    log_square = (square + 1e-12 * square.mean(0) + 1e-300).log()
    slope = 0.5 * _residuals(log_square, h)[1][1:].T
    eye = 1e-6 * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    value, size = torch.logsumexp(log_square - 2 * h @ slope.T, 0), slope.new_ones(len(slope))
    for _ in range(_NEWTON_STEPS):
        share = torch.softmax(log_square - 2 * h @ slope.T, 0)  # (N, D)
        mean = share.T @ h  # (D, k): minus half the gradient
        second = torch.einsum("nd,na,nb->dab", share, h, h) - mean[:, :, None] * mean[:, None, :]
        step = size[:, None] * torch.linalg.solve(2 * (second + eye), mean[..., None])[..., 0]
        tried = torch.logsumexp(log_square - 2 * h @ (slope + step).T, 0)
        better = tried <= value
        slope, value = torch.where(better[:, None], slope + step, slope), torch.where(better, tried, value)
        size = torch.where(better, (2 * size).clamp(max=1.0), size / 4)
    return 0.5 * (value - torch.log(value.new_tensor(float(len(h))))), slope


def _fitted(z: Tensor, drivers: Tensor) -> Coupling:
    """The coupling with these drivers (k,) for draws ``z`` (N, D), float64 and of unit size."""
    dim = z.shape[1]
    driven = torch.ones(dim, dtype=torch.bool, device=z.device)
    driven[drivers] = False
    centre = z.mean(0)
    h, x = (z - centre)[:, drivers], z[:, driven]
    return _assembled(driven, drivers, centre, _best(_beginnings(x, h), x, h))


def _beginnings(x: Tensor, h: Tensor) -> list[_Parts]:
    """Where fits of ``x`` (N, D) given drivers ``h`` (N, k) begin: with little data, and as much as prior."""
    residual, regression = _residuals(x, h)
    log_scale, slope = _log_scales(residual.square(), h)
    log_scale = log_scale.clamp(min=_NARROW)
    return [
        _Parts(regression[0], regression[1:].T, log_scale, slope, regression[0], start - 2 * log_scale)
        for start in _STARTS
    ]


def _best(beginnings: list[_Parts], x: Tensor, h: Tensor) -> _Parts:
    """The likelihoods' highest maxima next to these, row by row."""
    tried = [_climbed(begun, x, h, _TRIAL_STEPS) for begun in beginnings]
    costs, packed = torch.stack([cost for _, cost in tried]), torch.stack([parts.packed() for parts, _ in tried])
    rows = torch.arange(costs.shape[1], device=costs.device)
    return _unpacked(packed[costs.nan_to_num(nan=torch.inf).argmin(0), rows])


def _assembled(driven: Tensor, drivers: Tensor, centre: Tensor, parts: _Parts) -> Coupling:
    """The coupling of these latents; ``centre`` (D,) holds for the drivers."""
    dim, rows = len(centre), driven.nonzero()

    def spread(values: Tensor) -> Tensor:
        return centre.new_zeros(dim).masked_scatter(driven, values)

    shift, slope = centre.new_zeros(dim, dim), centre.new_zeros(dim, dim)
    shift[rows, drivers], slope[rows, drivers] = parts.shift, parts.slope
    centre = centre.masked_scatter(driven, parts.loc)
    scale, data, precision = (spread(x) for x in (parts.log_scale, parts.data, parts.log_precision))
    return Coupling(driven.to(centre), centre, shift, scale, slope, data, precision)


def refit_coupling(z: Tensor, held: Coupling) -> Coupling:
    """The coupling with the drivers of the one that is ``held``, refitted to equally weighted draws ``z`` (N, D)."""
    wide = _some(z, _FITTED).double()
    sd = _size(wide)
    coupling = _rescaled(Coupling(*(part.double() for part in held)), torch.zeros_like(sd), 1 / sd)
    driven, x = coupling.driven > 0, wide / sd
    drivers = (~driven).nonzero()[:, 0]
    rows = driven.nonzero()
    parts = _Parts(
        coupling.centre[driven],
        coupling.shift[rows, drivers],
        coupling.log_scale[driven],
        coupling.slope[rows, drivers],
        coupling.data[driven],
        coupling.log_precision[driven],
    )
    h, x = (x - coupling.centre)[:, drivers], x[:, driven]
    # Where the draws have moved, that of the held one may be a poor maximum.
    best, _ = _climbed(_best([parts, *_beginnings(x, h)], x, h), x, h, _FISHER_STEPS)
    made = _rescaled(_assembled(driven, drivers, coupling.centre, best), torch.zeros_like(sd), sd)
    return Coupling(*(part.to(z) for part in made))


def _size(z: Tensor) -> Tensor:
    """Standard deviations (D,) of draws ``z`` (N, D); 1 of what does not vary."""
    sd = z.std(0)
    return torch.where(sd > 1e-12 * z.abs().amax(0), sd, 1.0)


def _candidates(x: Tensor, gains: Tensor, best: Coupling | None, drivers: list[int]) -> list[int]:
    """Latents to try as the next driver."""
    total = gains.sum(1)
    total[drivers] = -1.0
    found = [int(j) for j in total.topk(min(1 if drivers else _FIRST, len(total))).indices if float(total[j]) > 0]
    if best is not None:
        v = best.to_noncentred(x)
        square = torch.corrcoef(v.T).square().nan_to_num()
        square.fill_diagonal_(0.0)
        linked = square.sum(1)
        linked[drivers] = -1.0
        found += [int(j) for j in linked.topk(min(_CORRELATED, len(linked))).indices if int(j) not in drivers]
    return list(dict.fromkeys(found))


def _effective(z: Tensor) -> float:
    """The effective number of draws ``z`` (N, D) of which some are repeated."""
    counts = torch.unique(z, dim=0, return_counts=True)[1].double()
    return float(counts.sum().square() / counts.square().sum())


def _some(z: Tensor, numbers: int) -> Tensor:
    """Every so many of draws ``z`` (N, D), which may be in the order of their rounds."""
    return z[:: max(len(z) // max(numbers // z.shape[1], _FEWEST), 1)]


def fit_coupling(z: Tensor, *, min_gain: float = 0.5) -> Coupling | None:
    """The coupling that equally weighted draws ``z`` (N, D) ask for; None if there is none that is worth it.

    None, too, of too few draws that differ: pure noise would show drivers.

    Args:
        z: draws.
        min_gain: entropy (nats per draw) that the first driver must save, and each of the others half of; beyond what
            its parameters save by chance, one nat each over the number of draws. Half a nat is worth a network that
            begins anew; a funnel saves two for every latent that is driven (8.9 of five latents, 39 of
            twenty, of 4096 draws).
    """
    count = _effective(z)
    if z.shape[1] < 2 or count < _DRAWS[0] + _DRAWS[1] * z.shape[1]:
        return None
    wide = z.double()
    mean, sd = wide.mean(0), _size(wide)
    x = (wide - mean) / sd
    gains, best, some = _gains(x), None, _some(x, _TRIED)
    drivers: list[int] = []
    least = entropy(x, None)
    if not float(gains.sum(1).max()) >= min_gain / 4:
        return None
    while len(drivers) < x.shape[1] - 1:
        gains[:, drivers] = 0.0  # a driver is not driven
        tried = [
            (j, _fitted(some, torch.tensor([*drivers, j], device=z.device)))
            for j in _candidates(x, gains, best, drivers)
        ]
        if not tried:
            break
        lowest, driver, coupling = min(((entropy(x, c), j, c) for j, c in tried), key=lambda one: one[0])
        per_driver = 2 * (x.shape[1] - len(drivers) - 1) / count
        if not lowest < least - per_driver - (min_gain + _OWN * x.shape[1] / count if best is None else min_gain / 2):
            break
        drivers, best, least = [*drivers, driver], coupling, lowest
    if best is None:
        return None
    found = refit_coupling(z, Coupling(*(part.to(z) for part in _rescaled(best, mean, sd))))
    return found if entropy(z, found) < entropy(z, None) - min_gain else None


def _rescaled(coupling: Coupling, mean: Tensor, sd: Tensor) -> Coupling:
    """For ``mean + sd z`` in the place of ``z``; drivers keep their own size, ``v`` of the driven is of unit size."""
    return coupling._replace(
        centre=mean + sd * coupling.centre,
        shift=sd[:, None] * coupling.shift / sd,
        log_scale=coupling.log_scale + sd.log(),
        slope=coupling.slope / sd,
        data=mean + sd * coupling.data,
        log_precision=coupling.log_precision - 2 * sd.log(),
    )
