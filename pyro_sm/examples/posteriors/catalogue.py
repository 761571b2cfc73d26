# SPDX-License-Identifier: Apache-2.0
"""The fifteen posteriors, with their data.

Data, names and reference draws: the posterior database https://github.com/stan-dev/posteriordb (BSD-3). Moments are
exact (closed form and quadrature) where the file says so, else those of 10 chains of 1000 draws. Improper flat priors
have density one, half-priors are normalised, ordered vectors have the unnormalised density that their Stan programs
give them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_sm.examples import eight_schools
from pyro_sm.examples.posteriors.gaussian_process import gaussian_process
from pyro_sm.examples.posteriors.hidden_markov import drive_to_the_basket, normal_emissions
from pyro_sm.examples.posteriors.lotka_volterra import lotka_volterra
from pyro_sm.examples.posteriors.mixtures import ordered_mixture
from pyro_sm.examples.posteriors.posterior import Content, Moments, Posterior, read
from pyro_sm.examples.posteriors.regressions import (
    flat_regression,
    half_cauchy_regression,
    normal_regression,
    straight_line,
    with_intercept,
)
from pyro_sm.examples.posteriors.time_series import autoregression, garch


def _posterior(
    name: str, model: Callable[..., None], args: Callable[[Content], tuple[Tensor, ...]], remark: str
) -> Posterior:
    content = read(name)
    return Posterior(name, model, args(content), content.reference, content.log_evidence, remark)


def _eight_schools() -> tuple[Posterior, Posterior]:
    exact = eight_schools.exact()
    reference = {name: Moments(exact.mean[name], exact.sd[name], 0.0, 0.0) for name in exact.mean}
    y, sigma = (x.double() for x in eight_schools.data())
    return (
        Posterior(
            "eight_schools-eight_schools_centered",
            eight_schools.centered,
            (y, sigma),
            reference,
            exact.log_evidence,
            "a funnel: the scale of the effects is itself uncertain",
        ),
        Posterior(
            "eight_schools-eight_schools_noncentered",
            eight_schools.noncentered,
            (y, sigma),
            reference,
            exact.log_evidence,
            "the same posterior with whitened effects; the reference's theta is a deterministic site",
        ),
    )


def _mesquite(content: Content) -> tuple[Tensor, ...]:
    sizes = ("diam1", "diam2", "canopy_height", "total_height", "density")
    columns = [content.data[name].log() for name in sizes]
    return with_intercept(*columns, content.data["group"]), content.data["weight"].log()


def _kilpisjarvi(content: Content) -> tuple[Tensor, ...]:
    d = content.data
    return d["x"], d["y"], torch.stack([d["pmualpha"], d["pmubeta"]]), torch.stack([d["psalpha"], d["psbeta"]])


def _interaction(first: Tensor, second: Tensor) -> Tensor:
    return with_intercept(first, second, first * second)


def posteriors() -> dict[str, Posterior]:
    """All of them by name; the files are read at each call."""
    centred, noncentred = _eight_schools()
    found = [
        _posterior(
            "arK-arK", autoregression, lambda c: (c.data["y"],), "AR(5), nearly Gaussian, correlated coefficients"
        ),
        _posterior(
            "bball_drive_event_0-hmm_drive_0",
            drive_to_the_basket,
            lambda c: (c.data["u"], c.data["v"], c.data["alpha"]),
            "hidden Markov model, 416 steps summed out",
        ),
        _posterior(
            "earnings-logearn_interaction",
            flat_regression,
            lambda c: (_interaction(c.data["height"], c.data["male"]), c.data["earn"].log()),
            "unscaled, all but collinear columns",
        ),
        centred,
        noncentred,
        _posterior(
            "garch-garch11",
            garch,
            lambda c: (c.data["y"], c.data["sigma1"]),
            "flat on a triangle in (alpha1, beta1), close to its edge",
        ),
        _posterior(
            "gp_pois_regr-gp_regr", gaussian_process, lambda c: (c.data["x"], c.data["y"]), "three hyperparameters"
        ),
        _posterior(
            "hmm_example-hmm_example",
            normal_emissions,
            lambda c: (c.data["y"],),
            "hidden Markov model, 100 steps summed out",
        ),
        _posterior(
            "hudson_lynx_hare-lotka_volterra",
            lotka_volterra,
            lambda c: (c.data["y_init"], c.data["y"]),
            "the mean solves a differential equation",
        ),
        _posterior(
            "kidiq-kidscore_interaction",
            half_cauchy_regression,
            lambda c: (_interaction(c.data["mom_hs"], c.data["mom_iq"]), c.data["kid_score"]),
            "unscaled, correlated columns; improper flat prior on beta",
        ),
        _posterior(
            "kidiq-kidscore_momiq",
            half_cauchy_regression,
            lambda c: (with_intercept(c.data["mom_iq"]), c.data["kid_score"]),
            "one unscaled regressor; improper flat prior on beta",
        ),
        _posterior(
            "kilpisjarvi_mod-kilpisjarvi",
            straight_line,
            _kilpisjarvi,
            "years uncentred: intercept and slope are all but collinear; keep it in float64",
        ),
        _posterior(
            "low_dim_gauss_mix-low_dim_gauss_mix",
            ordered_mixture,
            lambda c: (c.data["y"],),
            "one of two symmetric modes, chosen by ordering the means",
        ),
        _posterior(
            "mesquite-logmesquite", flat_regression, _mesquite, "six regressors, 46 bushes; all priors improper"
        ),
        _posterior(
            "sblrc-blr",
            normal_regression,
            lambda c: (c.data["X"], c.data["y"]),
            "regressors in the hundreds: coefficients known to a thousandth",
        ),
    ]
    return {posterior.name: posterior for posterior in found}
