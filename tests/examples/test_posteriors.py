# SPDX-License-Identifier: Apache-2.0
"""The fifteen posteriors are those whose answers are quoted: restated in NumPy, and held against reference draws.

``data/posteriordb_draws.npz``: 400 of the 10,000 reference draws of each posterior (every 25th), from the posterior
database (BSD-3, ``pyro_sm/examples/data/LICENCE-posteriordb.md``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from pyro_sm import ModelDensity
from pyro_sm.examples import eight_schools
from pyro_sm.examples.posteriors import Posterior, posteriors
from pyro_sm.examples.posteriors.hidden_markov import log_product
from pyro_sm.examples.posteriors.lotka_volterra import STEPS_PER_YEAR, log_populations
from pyro_sm.examples.posteriors.positive_normal import PositiveNormal
from pyro_sm.examples.posteriors.time_series import discounted_sums

# Eight schools has no float64 constants: its priors take the default type.
pytestmark = pytest.mark.usefixtures("float64")

ALL = posteriors()
NAMES = sorted(ALL)
EXACT = sorted(name for name, posterior in ALL.items() if posterior.log_evidence is not None)
_DRAWS = Path(__file__).parents[1] / "data" / "posteriordb_draws.npz"
Scalars = dict[str, float]


@functools.cache
def density_of(name: str) -> ModelDensity:
    return ModelDensity(ALL[name].model, ALL[name].args, dtype=torch.float64)


@functools.cache
def draws_of(name: str) -> dict[str, Tensor]:
    """Reference draws (400,) by scalar."""
    stored = name.replace("_noncentered", "").replace("_centered", "")
    with np.load(_DRAWS) as file:
        return dict(zip(file[f"{stored}:names"].tolist(), torch.tensor(file[stored]).T, strict=True))


def latents(name: str) -> Tensor:
    """The reference draws in unconstrained space (400, D)."""
    draws, density = draws_of(name), density_of(name)
    values = {}
    for site in density.sites:
        if site.name == "theta_raw":
            parts = [(draws[f"theta[{j}]"] - draws["mu"]) / draws["tau"] for j in range(1, 9)]
            values[site.name] = torch.stack(parts, 1)
        elif site.name == "beta1_share":
            values[site.name] = draws["beta1"] / (1 - draws["alpha1"])
        elif site.name in draws:
            values[site.name] = draws[site.name]
        else:
            parts = [draws[f"{site.name}[{k}]"] for k in range(1, site.shape.numel() + 1)]
            values[site.name] = torch.stack(parts, 1)
    return density.pack(values)


def scalars(name: str, z: Tensor) -> Tensor:
    """The reference's scalars (N, K) at latents ``z`` (N, D)."""
    density = density_of(name)
    return ALL[name].scalars({**density.unpack(z), **density.deterministics(z)})


# ------------------------------------------------------------------------------ the models again, in NumPy

HALF = math.log(2)


def normal(x: object, loc: object, scale: object) -> float:
    return float(np.sum(stats.norm.logpdf(x, loc, scale)))


def half_cauchy(x: float, scale: float) -> float:
    return HALF + float(stats.cauchy.logpdf(x, 0, scale))


def vector(s: Scalars, name: str) -> np.ndarray:
    return np.array([s[f"{name}[{k}]"] for k in range(1, 10) if f"{name}[{k}]" in s])


def ark(s: Scalars, y: np.ndarray) -> float:
    beta, value = vector(s, "beta"), normal(s["alpha"], 0, 10) + half_cauchy(s["sigma"], 2.5)
    value += normal(beta, 0, 10)
    for t in range(5, len(y)):
        value += normal(y[t], s["alpha"] + sum(beta[k - 1] * y[t - k] for k in range(1, 6)), s["sigma"])
    return value


def forward(start: np.ndarray, rows: np.ndarray, emission: np.ndarray) -> float:
    """The textbook's recursion, on log scale, step by step."""
    gamma = start
    for t in range(1, len(emission)):
        gamma = np.array([np.logaddexp.reduce(gamma + np.log(rows[:, k])) + emission[t, k] for k in range(2)])
    return float(np.logaddexp.reduce(gamma))


def basketball(s: Scalars, u: np.ndarray, v: np.ndarray, alpha: np.ndarray) -> float:
    rows = np.array([vector(s, "theta1"), vector(s, "theta2")])
    phi, lam = vector(s, "phi"), vector(s, "lambda")
    # normalised here: scipy refuses rows that sum to one only to printed precision
    value = sum(float(stats.dirichlet.logpdf(rows[k] / rows[k].sum(), alpha[k])) for k in range(2))
    value += normal(phi, [0, 3], 1) + normal(lam, [0, 3], 1)
    emission = stats.expon.logpdf(u[:, None], scale=1 / phi) + stats.expon.logpdf(v[:, None], scale=1 / lam)
    return value + forward(emission[0], rows, emission)


def hmm(s: Scalars, y: np.ndarray) -> float:
    rows, mu = np.array([vector(s, "theta1"), vector(s, "theta2")]), vector(s, "mu")
    emission = stats.norm.logpdf(y[:, None], mu, 1)
    return normal(mu, [3, 10], 1) + forward(emission[0], rows, emission)


def earnings(s: Scalars, x: np.ndarray, y: np.ndarray) -> float:
    b = vector(s, "beta")
    return normal(y, b[0] + b[1] * x[:, 1] + b[2] * x[:, 2] + b[3] * x[:, 1] * x[:, 2], s["sigma"])


def kid_score(s: Scalars, x: np.ndarray, y: np.ndarray) -> float:
    b = vector(s, "beta")
    mean = b[0] + b[1] * x[:, 1]
    if len(b) == 4:
        mean = mean + b[2] * x[:, 2] + b[3] * x[:, 1] * x[:, 2]
    return half_cauchy(s["sigma"], 2.5) + normal(y, mean, s["sigma"])


def mesquite(s: Scalars, x: np.ndarray, y: np.ndarray) -> float:
    return normal(y, x @ vector(s, "beta"), s["sigma"])


def blr(s: Scalars, x: np.ndarray, y: np.ndarray) -> float:
    value = normal(vector(s, "beta"), 0, 10) + HALF + normal(s["sigma"], 0, 10)
    return value + normal(y, x @ vector(s, "beta"), s["sigma"])


def kilpisjarvi(s: Scalars, x: np.ndarray, y: np.ndarray, loc: np.ndarray, scale: np.ndarray) -> float:
    value = normal(s["alpha"], loc[0], scale[0]) + normal(s["beta"], loc[1], scale[1])
    return value + normal(y, s["alpha"] + s["beta"] * x, s["sigma"])


def schools(s: Scalars, y: np.ndarray, sigma: np.ndarray) -> float:
    theta, value = vector(s, "theta"), normal(s["mu"], 0, 5) + half_cauchy(s["tau"], 5)
    return value + normal(theta, s["mu"], s["tau"]) + normal(y, theta, sigma)


def garch(s: Scalars, y: np.ndarray, first: np.ndarray) -> float:
    scale = [float(first)]
    for t in range(1, len(y)):
        variance = s["alpha0"] + s["alpha1"] * (y[t - 1] - s["mu"]) ** 2 + s["beta1"] * scale[-1] ** 2
        scale.append(math.sqrt(variance))
    return normal(y, s["mu"], scale)


def gp(s: Scalars, x: np.ndarray, y: np.ndarray) -> float:
    kernel = s["alpha"] ** 2 * np.exp(-((x[:, None] - x) ** 2) / (2 * s["rho"] ** 2)) + s["sigma"] * np.eye(len(x))
    value = float(stats.gamma.logpdf(s["rho"], 25, scale=1 / 4)) + 2 * HALF
    value += normal(s["alpha"], 0, 2) + normal(s["sigma"], 0, 1)
    return value + float(stats.multivariate_normal.logpdf(y, np.zeros(len(x)), kernel))


def lynx(s: Scalars, y_init: np.ndarray, y: np.ndarray) -> float:
    theta, z_init, sigma = vector(s, "theta"), vector(s, "z_init"), vector(s, "sigma")
    a, b, c, d = theta

    def rate(_: float, z: np.ndarray) -> list[float]:
        return [(a - b * z[1]) * z[0], (-c + d * z[0]) * z[1]]

    z = integrate.solve_ivp(rate, (0, 20), z_init, t_eval=range(1, 21), rtol=1e-10, atol=1e-10).y.T
    loc, scale = np.array([1, 0.05, 1, 0.05]), np.array([0.5, 0.05, 0.5, 0.05])
    value = normal(theta, loc, scale) - float(np.sum(stats.norm.logcdf(loc / scale)))
    value += float(np.sum(stats.lognorm.logpdf(z_init, 1, scale=10)))
    value += float(np.sum(stats.lognorm.logpdf(sigma, 1, scale=math.exp(-1))))
    value += float(np.sum(stats.lognorm.logpdf(y_init, sigma, scale=z_init)))
    return value + float(np.sum(stats.lognorm.logpdf(y, sigma, scale=z)))


def mixture(s: Scalars, y: np.ndarray) -> float:
    mu, sigma, theta = vector(s, "mu"), vector(s, "sigma"), s["theta"]
    value = normal(mu, 0, 2) + 2 * HALF + normal(sigma, 0, 2) + float(stats.beta.logpdf(theta, 5, 5))
    parts = np.log([theta, 1 - theta]) + stats.norm.logpdf(y[:, None], mu, sigma)
    return value + float(np.logaddexp.reduce(parts, 1).sum())


RESTATED: dict[str, Callable[..., float]] = {
    "arK-arK": ark,
    "bball_drive_event_0-hmm_drive_0": basketball,
    "earnings-logearn_interaction": earnings,
    "eight_schools-eight_schools_centered": schools,
    "eight_schools-eight_schools_noncentered": schools,
    "garch-garch11": garch,
    "gp_pois_regr-gp_regr": gp,
    "hmm_example-hmm_example": hmm,
    "hudson_lynx_hare-lotka_volterra": lynx,
    "kidiq-kidscore_interaction": kid_score,
    "kidiq-kidscore_momiq": kid_score,
    "kilpisjarvi_mod-kilpisjarvi": kilpisjarvi,
    "low_dim_gauss_mix-low_dim_gauss_mix": mixture,
    "mesquite-logmesquite": mesquite,
    "sblrc-blr": blr,
}


def log_det_jacobian(name: str, z: Tensor) -> float:
    """``log |det ∂(free scalars)/∂z|`` at one latent (D,), by central differences; of a simplex, all but the last."""
    step = 1e-5
    forward_z, backward_z = (z + sign * step * torch.eye(len(z), dtype=torch.float64) for sign in (1, -1))
    free = [i for i, scalar in enumerate(ALL[name].reference) if scalar not in ("theta1[2]", "theta2[2]")]
    slope = (scalars(name, forward_z) - scalars(name, backward_z))[:, free] / (2 * step)
    return float(torch.linalg.slogdet(slope).logabsdet)


@pytest.mark.parametrize("name", NAMES)
def test_log_density_is_that_of_the_stan_program(name: str) -> None:
    """Constants included: half-priors normalised, ordered vectors not, flat priors one."""
    posterior, density = ALL[name], density_of(name)
    z = latents(name)[::90]
    found = density.log_prob(z)
    data = [arg.numpy() for arg in posterior.args]
    for row, value, values in zip(z, found, scalars(name, z), strict=True):
        by_name = dict(zip(posterior.reference, values.tolist(), strict=True))
        expected = RESTATED[name](by_name, *data) + log_det_jacobian(name, row)
        # the fixed-step solution of the differential equation is right to 1e-5 only
        assert float(value) == pytest.approx(expected, abs=2e-3 if "lotka" in name else 2e-6)


# ------------------------------------------------------------------------------------------ batches and scores


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_a_loop_and_scores_are_slopes(name: str) -> None:
    density = density_of(name)
    assert density.batching_method == "outer plate"
    z = latents(name)[::57]
    value, score = density.log_prob_and_score(z)
    torch.testing.assert_close(value, density.log_prob_one_by_one(z), rtol=1e-10, atol=1e-10)
    spread = latents(name).std(0)
    for i in range(density.dim):
        step = torch.zeros(density.dim, dtype=torch.float64)
        step[i] = 1e-4 * spread[i]
        slope = (density.log_prob(z + step) - density.log_prob(z - step)) / (2 * step[i])
        torch.testing.assert_close(slope * spread[i], score[:, i] * spread[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_model_takes_its_type_from_its_data_where_it_can(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    if not name.startswith("eight_schools"):
        density = ModelDensity(ALL[name].model, ALL[name].args)
        improper_only = set(density.improper) == {site.name for site in density.sites}
        assert density.dtype == (torch.float32 if improper_only else torch.float64)


# ------------------------------------------------------------------------------------- against reference draws


def worst_of_stein(z: Tensor, score: Tensor) -> float:
    """Worst of ``E s_i = 0`` and ``E u_i s_i = −1``, in standard errors, in coordinates whitened by the draws."""
    centred = z - z.mean(0)
    tril = torch.linalg.cholesky(centred.T @ centred / len(z))
    u = torch.linalg.solve_triangular(tril, centred.T, upper=False).T
    s = score @ tril
    checks = torch.cat([s, u * s + 1], 1)
    return float((checks.mean(0) / (checks.std(0) / math.sqrt(len(z)))).abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_scores_average_as_they_must_over_reference_draws(name: str) -> None:
    z = latents(name)
    assert worst_of_stein(z, density_of(name).log_prob_and_score(z)[1]) < 5


def test_scores_without_a_jacobian_do_not() -> None:
    for name, site in (("eight_schools-eight_schools_noncentered", "tau"), ("garch-garch11", "beta1_share")):
        z, density = latents(name), density_of(name)
        (index,) = (site_.start for site_ in density.sites if site_.name == site)
        leaf = z.clone().requires_grad_(True)
        value = density.unpack(leaf)
        lost = value["tau"].log() if site == "tau" else torch.log1p(-value["alpha1"]) + value[site].log()
        (wrong,) = torch.autograd.grad(lost.sum(), leaf)
        assert wrong[:, index].abs().min() > 0
        assert worst_of_stein(z, density.log_prob_and_score(z)[1] - wrong) > 5


def test_scores_with_a_variance_read_as_a_standard_deviation_do_not() -> None:
    name = "gp_pois_regr-gp_regr"
    posterior, z = ALL[name], latents(name)
    x, y = posterior.args

    def wrong(x: Tensor, y: Tensor) -> None:
        rho = pyro.sample("rho", dist.Gamma(y.new_tensor(25.0), y.new_tensor(4.0)))
        alpha = pyro.sample("alpha", dist.HalfNormal(y.new_tensor(2.0)))
        sigma = pyro.sample("sigma", dist.HalfNormal(y.new_tensor(1.0)))
        kernel = (alpha**2)[..., None, None] * torch.exp(-0.5 * ((x[:, None] - x) / rho[..., None, None]) ** 2)
        kernel = kernel + (sigma**2)[..., None, None] * torch.eye(len(x), dtype=x.dtype)
        pyro.sample("y", dist.MultivariateNormal(0 * y, kernel), obs=y)

    assert worst_of_stein(z, ModelDensity(wrong, (x, y)).log_prob_and_score(z)[1]) > 5


@pytest.mark.parametrize("name", NAMES)
def test_quoted_moments_are_those_of_the_draws(name: str) -> None:
    posterior, draws = ALL[name], draws_of(name)
    for scalar, moments in posterior.reference.items():
        x = draws[scalar]
        n = len(x)
        assert abs(float(x.mean()) - moments.mean) < 5 * math.hypot(moments.sd / math.sqrt(n), moments.mean_se)
        fourth = float(((x - moments.mean) / moments.sd).pow(4).mean())
        assert abs(float(x.std()) / moments.sd - 1) < 5 * math.sqrt((fourth - 1) / (4 * n))
        if name in EXACT:
            assert moments.mean_se == moments.sd_se == 0
        else:
            assert 0.003 < moments.mean_se / moments.sd < 0.03  # of 10,000 all but independent draws: .01


@pytest.mark.parametrize("name", [name for name in EXACT if "_centered" not in name])  # a funnel: infinite variance
def test_log_evidence_by_importance_sampling(name: str) -> None:
    density, z = density_of(name), latents(name)
    centred = z - z.mean(0)
    # Student t with 5 degrees of freedom and twice the covariance of the draws: wider than the posterior all round
    proposal = dist.MultivariateStudentT(
        torch.tensor(5.0, dtype=torch.float64), z.mean(0), torch.linalg.cholesky(centred.T @ centred / len(z) * 1.2)
    )
    draws = proposal.sample((20_000,))
    log_weight = density.log_prob(draws) - proposal.log_prob(draws)
    weight = torch.exp(log_weight - log_weight.max())
    standard_error = float(weight.std() / weight.mean() / math.sqrt(len(weight)))
    found = float(torch.logsumexp(log_weight, 0)) - math.log(len(weight))
    assert standard_error < 0.02
    assert abs(found - ALL[name].log_evidence) < max(0.02, 4 * standard_error)


# ------------------------------------------------------------------------------------------------- the value type


def test_fifteen_posteriors_that_know_themselves() -> None:
    assert len(ALL) == 15
    assert all(name == posterior.name and posterior.remark for name, posterior in ALL.items())
    assert all(arg.dtype == torch.float64 for posterior in ALL.values() for arg in posterior.args)
    assert len(EXACT) == 10


def two_points(posterior: Posterior) -> dict[str, Tensor]:
    """Two draws by site whose means and standard deviations are the reference's."""
    sites: dict[str, list[Tensor]] = {}
    for scalar, moments in posterior.reference.items():
        half = moments.sd / math.sqrt(2)
        points = torch.tensor([moments.mean - half, moments.mean + half], dtype=torch.float64)
        sites.setdefault(scalar.split("[")[0], []).append(points)
    single = [scalar for scalar in posterior.reference if "[" not in scalar]
    return {site: parts[0] if site in single else torch.stack(parts, 1) for site, parts in sites.items()}


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_zero_for_the_reference_and_one_for_a_shift_by_one_sd(name: str) -> None:
    posterior = ALL[name]
    samples = two_points(posterior)
    assert max(posterior.errors(samples)) < 1e-9
    last = list(posterior.reference)[-1]
    site, sd = last.split("[")[0], posterior.reference[last].sd
    shifted = samples[site].clone()
    shifted.reshape(2, -1)[:, -1] += sd
    assert posterior.errors({**samples, site: shifted}).mean == pytest.approx(1)
    assert posterior.errors({**samples, site: shifted * 0}).sd == pytest.approx(1)
    with pytest.raises(ValueError, match=f"expected draws of the site '{site}'"):
        posterior.errors({key: value for key, value in samples.items() if key != site})


def test_exact_moments_of_eight_schools_agree_with_its_draws() -> None:
    exact, drawn = eight_schools.exact(), eight_schools.reference()
    assert exact.log_evidence == drawn.log_evidence
    for i, name in enumerate(exact.mean):
        assert exact.mean[name] == pytest.approx(float(drawn.mean[i]), abs=5 * exact.sd[name] / 100)


# ------------------------------------------------------------------------------------------- pieces of the models


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 200])
def test_discounted_sums_are_the_recursion(length: int) -> None:
    x, discount = torch.randn(3, length), torch.tensor([[0.9], [0.0], [0.3]])
    expected, state = [], torch.zeros(3)
    for t in range(length):
        state = discount[:, 0] * state + x[:, t]
        expected.append(state)
    torch.testing.assert_close(discounted_sums(x, discount), torch.stack(expected, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 33])
def test_log_product_is_the_product_in_order(length: int) -> None:
    matrices = torch.rand(4, length, 3, 3)
    expected = torch.linalg.multi_dot(list(matrices[0])) if length > 1 else matrices[0, 0]
    found = log_product(matrices.log())
    assert found.shape == (4, 3, 3)
    torch.testing.assert_close(found[0].exp(), expected, rtol=1e-10, atol=0)


def test_populations_converge_with_order_four() -> None:
    z = latents("hudson_lynx_hare-lotka_volterra")[:20]
    values = density_of("hudson_lynx_hare-lotka_volterra").unpack(z)
    truth = log_populations(values["theta"], values["z_init"], 20, 256)
    errors = []
    for steps in (4, 8, 16, 32, 64):
        error = log_populations(values["theta"], values["z_init"], 20, steps) - truth
        errors.append(math.log2(float(error.square().mean().sqrt())))
    slope = np.polyfit(range(5), errors, 1)[0]
    assert slope == pytest.approx(-4, abs=0.15)


def test_populations_are_as_exact_as_asked() -> None:
    values = density_of("hudson_lynx_hare-lotka_volterra").unpack(latents("hudson_lynx_hare-lotka_volterra"))
    truth = log_populations(values["theta"], values["z_init"], 20, 64)
    for steps, good in ((STEPS_PER_YEAR, True), (STEPS_PER_YEAR // 2, False)):
        error = (log_populations(values["theta"], values["z_init"], 20, steps) - truth).abs().max()
        assert (float(error) < 1e-5) == good


@pytest.mark.parametrize(("loc", "scale"), [(1.0, 0.5), (0.05, 0.05), (-2.0, 1.5)])
def test_positive_normal_is_the_truncated_normal(loc: float, scale: float) -> None:
    found = PositiveNormal(torch.tensor(loc), torch.tensor(scale))
    known = stats.truncnorm(-loc / scale, math.inf, loc, scale)
    x = torch.tensor([1e-3, 0.02, 0.3, 1.0, 2.0])
    np.testing.assert_allclose(found.log_prob(x), known.logpdf(x.numpy()), rtol=1e-10)
    draws = found.sample((20_000,))
    assert draws.min() > 0
    assert stats.kstest(draws.numpy(), known.cdf).statistic < 2 / math.sqrt(20_000)
    # the untruncated normal fails that
    assert stats.kstest(draws.numpy(), stats.norm(loc, scale).cdf).statistic > 2 / math.sqrt(20_000)


def test_positive_normal_checks_expands_and_is_reparametrised() -> None:
    loc = torch.tensor([1.0, -0.5], requires_grad=True)
    prior = PositiveNormal(loc, torch.tensor([0.5, 2.0])).expand(torch.Size([3, 2])).to_event(1)
    assert prior.batch_shape == (3,)
    assert prior.sample((4,)).shape == (4, 3, 2)
    with pytest.raises(ValueError, match="support"):
        PositiveNormal(loc, torch.tensor(1.0), validate_args=True).log_prob(torch.tensor(-1.0))

    def draw(shift: float) -> Tensor:
        torch.manual_seed(3)
        return PositiveNormal(loc + shift, torch.tensor([0.5, 2.0])).rsample()

    (slope,) = torch.autograd.grad(draw(0.0).sum(), loc)
    torch.testing.assert_close(slope, (draw(1e-6) - draw(-1e-6)).detach() / 2e-6, rtol=1e-6, atol=1e-6)
