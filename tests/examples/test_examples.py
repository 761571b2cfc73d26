# SPDX-License-Identifier: Apache-2.0
"""The shipped posteriors: the density is the one whose answers are quoted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td

from pyro_sm import ModelDensity
from pyro_sm.examples import eight_schools, galaxies
from pyro_sm.examples.improper import factor_model
from pyro_sm.targets.gaussian_mixture import GaussianMixture


@pytest.mark.parametrize("shared", [False, True])
def test_galaxy_density_by_hand(shared: bool) -> None:
    y = galaxies.velocities()
    assert y.shape == (82,)
    assert float(y[77]) == pytest.approx(26.96)  # the corrected value that the literature uses
    density = ModelDensity(galaxies.galaxy_mixture(3, shared_variance=shared), (y,))
    z = density.prior_draws(5)
    values = density.unpack(z)
    by_hand = torch.zeros(5)
    for i in range(5):
        q, mu = values["weight"][i], values["mean"][i]
        s2 = values["variance"][i].expand(3)
        by_hand[i] += td.Dirichlet(torch.ones(3)).log_prob(q) + td.Normal(20.0, 10.0).log_prob(mu).sum()
        by_hand[i] += td.InverseGamma(3.0, 20.0).log_prob(values["variance"][i]).sum()
        parts = [q[k].log() + td.Normal(mu[k], s2[k].sqrt()).log_prob(y) for k in range(3)]
        by_hand[i] += torch.logsumexp(torch.stack(parts), 0).sum()
    jacobian = torch.zeros(5)
    for site in density.sites:
        unconstrained = z[:, site.start : site.stop].reshape(5, *site.unconstrained_shape)
        jacobian += site.transform.log_abs_det_jacobian(unconstrained, values[site.name]).reshape(5, -1).sum(1)
    torch.testing.assert_close(density.log_prob(z), by_hand + jacobian, rtol=1e-4, atol=1e-3)


def test_galaxy_posterior_is_symmetric_under_relabelling() -> None:
    density = ModelDensity(galaxies.galaxy_mixture(3), (galaxies.velocities(),))
    values = density.unpack(density.prior_draws(4))
    order = torch.tensor([2, 0, 1])
    permuted = density.pack({name: value[:, order] for name, value in values.items()})
    # The Jacobian of the simplex is not symmetric in its coordinates: compare in constrained space.
    simplex = density.sites[0].transform

    def constrained(z: torch.Tensor) -> torch.Tensor:
        part = z[:, density.sites[0].start : density.sites[0].stop]
        return density.log_prob(z) - simplex.log_abs_det_jacobian(part, simplex(part))

    torch.testing.assert_close(constrained(permuted), constrained(density.pack(values)), rtol=1e-4, atol=1e-3)


def test_labelling_shares_add_up_and_name_orders() -> None:
    shares = galaxies.labelling_shares(
        torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [4.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    )
    assert shares == {(1, 2, 0): 0.5, (0, 1, 2): 0.25, (0, 2, 1): 0.25}


def test_eight_schools_log_evidence_by_quadrature() -> None:
    """The exact value quoted is that of these very models: θ integrated analytically, (μ, log τ) on a grid."""
    y, sigma = (x.double() for x in eight_schools.data())
    mu = torch.linspace(-45, 45, 451, dtype=torch.float64)
    log_tau = torch.linspace(-18, 9, 1351, dtype=torch.float64)
    grid_mu, tau = mu[:, None], log_tau.exp()[None, :]
    log_p = td.Normal(0.0, 5.0).log_prob(grid_mu) + td.HalfCauchy(5.0).log_prob(tau) + log_tau
    for j in range(8):
        log_p = log_p + td.Normal(grid_mu, (sigma[j] ** 2 + tau**2).sqrt()).log_prob(y[j])
    area = math.log(float((mu[1] - mu[0]) * (log_tau[1] - log_tau[0])))
    exact = float(torch.logsumexp(log_p.reshape(-1), 0)) + area
    assert exact == pytest.approx(eight_schools.reference().log_evidence, abs=1e-4)


def test_the_two_parametrisations_are_one_posterior() -> None:
    centred = ModelDensity(eight_schools.centered, eight_schools.data())
    noncentred = ModelDensity(eight_schools.noncentered, eight_schools.data())
    z = noncentred.prior_draws(6)
    values = {**noncentred.unpack(z), **noncentred.deterministics(z)}
    jacobian = 8 * values["tau"].log()
    other = centred.pack({name: values[name] for name in ("mu", "tau", "theta")})
    torch.testing.assert_close(centred.log_prob(other), noncentred.log_prob(z) - jacobian, rtol=1e-4, atol=1e-3)


def test_errors_are_zero_for_the_reference_itself() -> None:
    truth = eight_schools.reference()
    two = torch.stack([truth.mean - truth.sd / math.sqrt(2), truth.mean + truth.sd / math.sqrt(2)])
    worst = eight_schools.errors({"theta": two[:, :8], "mu": two[:, 8], "tau": two[:, 9]})
    assert worst.mean < 1e-5
    assert worst.sd < 1e-5


def test_factor_model_is_the_density_and_nothing_else() -> None:
    target = GaussianMixture()
    density = ModelDensity(factor_model(target.log_prob, 2))
    z = torch.randn(7, 2) * 20
    torch.testing.assert_close(density.log_prob(z), target.log_prob(z))
    assert density.improper == ("x",)
