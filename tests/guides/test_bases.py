# SPDX-License-Identifier: Apache-2.0
"""Gaussian bases against posteriors known in closed form, and what they say where there is none."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_sm import AutoDiffusion, BatchAndMatchBase, GivenBase, LaplaceBase, ModelDensity, PriorBase, PyroSMWarning
from pyro_sm.density import FunctionDensity
from pyro_sm.gaussians.batch_and_match import BatchAndMatchFit, Gaussian
from pyro_sm.gaussians.gaussian import fits, moments_of
from pyro_sm.gaussians.laplace import Laplace
from pyro_sm.nn.mlp import MLP

LOC = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
TRIL = torch.tensor([[1.5, 0, 0], [-0.6, 0.8, 0], [0.3, 0.4, 2.0]], dtype=torch.float64)
MATRIX = torch.tensor([[1.0, 0.5, -0.3], [0.0, 2.0, 1.0]], dtype=torch.float64)
DATA = torch.tensor([2.0, -3.0], dtype=torch.float64)


def linear(y):
    x = pyro.sample("x", dist.MultivariateNormal(LOC, scale_tril=TRIL))
    mean = (MATRIX @ x.unsqueeze(-1)).squeeze(-1)
    pyro.sample("y", dist.Normal(mean, 0.7).to_event(1), obs=y)


def posterior():
    precision = torch.linalg.inv(TRIL @ TRIL.T) + MATRIX.T @ MATRIX / 0.49
    covariance = torch.linalg.inv(precision)
    return covariance @ (torch.linalg.inv(TRIL @ TRIL.T) @ LOC + MATRIX.T @ DATA / 0.49), covariance


def test_laplace_is_exact_for_a_gaussian(float64):
    density = ModelDensity(linear, (DATA,))
    base = LaplaceBase().fit(density)
    loc, covariance = posterior()
    torch.testing.assert_close(base.loc, loc, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(base.scale_tril @ base.scale_tril.T, covariance, rtol=1e-6, atol=1e-6)
    assert bool((base.scale_tril.triu(1) == 0).all())
    assert (covariance - covariance.diag().diag()).abs().max() > 0.1  # there was a correlation to find
    wider = LaplaceBase(inflate=1.5).fit(density)
    torch.testing.assert_close(wider.scale_tril, 1.5 * base.scale_tril, rtol=1e-5, atol=1e-6)


def test_laplace_in_float32():
    def model(y):
        x = pyro.sample("x", dist.MultivariateNormal(LOC.float(), scale_tril=TRIL.float()))
        mean = (MATRIX.float() @ x.unsqueeze(-1)).squeeze(-1)
        pyro.sample("y", dist.Normal(mean, 0.7).to_event(1), obs=y)

    base = LaplaceBase().fit(ModelDensity(model, (DATA.float(),)))
    loc, covariance = posterior()
    assert base.loc.dtype == base.scale_tril.dtype == torch.float32
    scale = covariance.diagonal().sqrt()
    assert bool(((base.loc - loc).abs() < 0.01 * scale).all())
    assert bool(((base.scale_tril @ base.scale_tril.T - covariance).abs() < 0.02 * torch.outer(scale, scale)).all())


def test_laplace_counts_its_evaluations(float64):
    density = ModelDensity(linear, (DATA,))
    LaplaceBase(num_starts=50).fit(density)
    assert density.evaluations.values == 50 + density.evaluations.scores
    assert density.evaluations.scores >= 2 * density.dim


def test_laplace_starts_at_the_higher_mode(float64):
    """A mode of weight 0.9 far from the prior's centre, found because many draws are tried."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 5.0))
        modes = torch.stack([math.log(0.1) - 0.5 * ((x + 4) / 0.5) ** 2, math.log(0.9) - 0.5 * ((x - 6) / 0.5) ** 2])
        pyro.factor("likelihood", torch.logsumexp(modes, 0))

    base = LaplaceBase().fit(ModelDensity(model))
    assert abs(base.loc - 6) < 0.1
    assert abs(base.scale_tril - 0.5) < 0.01


def test_laplace_along_a_flat_direction(float64):
    def model():
        pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.sample("y", dist.Normal(1.0, 2.0))

    with pytest.warns(PyroSMWarning, match="flat or convex in 2 of 3 directions"):
        base = LaplaceBase(max_scale=7.0).fit(ModelDensity(model))
    torch.testing.assert_close(base.scale_tril.diagonal(), torch.tensor([7.0, 7.0, 2.0]), rtol=1e-5, atol=1e-5)


def test_laplace_needs_a_place_to_start():
    class Prior(FunctionDensity):
        def prior_draws(self, num_draws):
            return torch.randn(num_draws, 1)

    impossible = Prior(lambda z: torch.full_like(z[:, 0], -math.inf), 1)
    with pytest.raises(ValueError, match="not finite at any of 256 prior draws: give a GivenBase"):
        LaplaceBase().fit(impossible)


def test_laplace_says_so_where_there_is_no_mode_to_stop_at(monkeypatch):
    """Widths so unequal that their matrix has no factor in these numbers, as at the bottom of a funnel's neck."""
    turned = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    covariance = turned @ torch.diag(torch.tensor([1.0, 1e-40, -1e-17], dtype=torch.float64)) @ turned.T
    monkeypatch.setattr("pyro_sm.guides.bases.laplace", lambda *a, **k: Laplace(torch.zeros(3), covariance, 0))

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(ValueError, match="neck of a funnel"):
        LaplaceBase().fit(ModelDensity(model))


def test_batch_and_match_is_close_for_a_gaussian(float64):
    density = ModelDensity(linear, (DATA,))
    base = BatchAndMatchBase(inflate=1.0).fit(density)
    loc, covariance = posterior()
    scale = covariance.diagonal().sqrt()
    assert bool(((base.loc - loc).abs() < 0.02 * scale).all())
    assert bool(((base.scale_tril @ base.scale_tril.T - covariance).abs() < 0.02 * torch.outer(scale, scale)).all())
    assert 150 * 32 < density.evaluations.scores < 150 * 32 + 1200  # the mode is sought first, and rest last


def test_batch_and_match_is_wider_by_default(float64):
    base = BatchAndMatchBase().fit(ModelDensity(linear, (DATA,)))
    _, covariance = posterior()
    torch.testing.assert_close((base.scale_tril @ base.scale_tril.T) / 1.44, covariance, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("rank", [1, 3])
def test_batch_and_match_with_a_rank(float64, rank):
    density = ModelDensity(linear, (DATA,))
    base = BatchAndMatchBase(inflate=1.0, rank=rank).fit(density)
    loc, covariance = posterior()
    found = base.scale_tril @ base.scale_tril.T
    assert bool((base.scale_tril.triu(1) == 0).all())
    if rank == 3:  # every covariance is a diagonal plus rank three
        torch.testing.assert_close(base.loc, loc, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found, covariance, rtol=1e-3, atol=1e-3)
    rest = found - covariance.diagonal().diag()
    assert float(torch.linalg.eigvalsh(rest).abs().max()) > 0.05, "a correlation was found"


def test_batch_and_match_with_many_latents_is_low_rank(float64):
    """One factor ties 250 latents together, before and after the data; a diagonal would miss it."""
    dim = 250
    weight = torch.linspace(-1.0, 2.0, dim)
    data = torch.sin(torch.arange(dim)) + weight

    def model():
        prior = dist.LowRankMultivariateNormal(torch.zeros(dim), weight[:, None], torch.ones(dim))
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=data)

    prior_precision = torch.linalg.inv(torch.eye(dim) + torch.outer(weight, weight))
    covariance = torch.linalg.inv(prior_precision + torch.eye(dim))
    base = BatchAndMatchBase(inflate=1.0).fit(ModelDensity(model))
    torch.testing.assert_close(base.loc, covariance @ data, rtol=0.0, atol=0.05)
    found = base.scale_tril @ base.scale_tril.T
    torch.testing.assert_close(found, covariance, rtol=0.0, atol=0.05)
    tied = covariance - covariance.diagonal().diag()
    assert float(tied.norm() / covariance.norm()) > 0.05, "there was something beside the diagonal"


def test_batch_and_match_refuses_no_rank():
    with pytest.raises(ValueError, match="rank >= 1, found 0"):
        BatchAndMatchBase(rank=0)


def test_prior_moments(float64):
    n = 20_000

    def model():
        pyro.sample("a", dist.Normal(3.0, 2.0))
        pyro.sample("b", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("n", 2):
            pyro.sample("c", dist.Normal(torch.tensor([0.0, 10.0]), torch.tensor([1.0, 4.0])))

    density = ModelDensity(model)
    base = PriorBase(num_draws=n).fit(density)
    loc, scale = torch.tensor([3.0, -1.0, 0.0, 10.0]), torch.tensor([2.0, 0.5, 1.0, 4.0])
    # standard errors of the median and of 1.4826 times the median absolute deviation of normal draws
    assert bool(((base.loc - loc).abs() < 5 * 1.2533 * scale / n**0.5).all())
    found = base.scale_tril.diagonal()
    assert bool(((found - scale).abs() < 5 * 1.1664 * scale / n**0.5).all())
    assert bool(((found / 1.4826 - scale).abs() > 5 * 1.1664 * scale / n**0.5).all())  # the factor forgotten
    assert torch.equal(base.scale_tril, found.diag())
    assert density.evaluations.values == 0
    wide = PriorBase(num_draws=n, inflate=3.0).fit(density).scale_tril.diagonal()
    torch.testing.assert_close(wide, 3 * scale, rtol=0.1, atol=0.0)


def test_prior_moments_are_robust(float64):
    """Moments of a Cauchy do not exist; its median and quartiles do."""

    def model():
        pyro.sample("x", dist.Cauchy(1.0, 2.0))

    base = PriorBase(num_draws=20_000).fit(ModelDensity(model))
    assert abs(base.loc - 1) < 0.15
    assert abs(base.scale_tril - 1.4826 * 2) < 0.25


def test_prior_that_is_a_point_has_a_scale_all_the_same(float64):
    def model():
        pyro.sample("x", dist.Normal(1.0, 1e-12))

    assert float(PriorBase().fit(ModelDensity(model)).scale_tril) == pytest.approx(1e-6)


def test_improper_prior_warns_by_name():
    def model():
        pyro.sample("proper", dist.Normal(5.0, 1.0))
        pyro.sample("flat", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("likelihood", torch.zeros(()))

    with pytest.warns(PyroSMWarning, match=r"site 'flat' has an improper prior.*N\(0, 4.0\^2\)"):
        base = PriorBase(improper_scale=4.0).fit(ModelDensity(model))
    assert base.loc[1:].tolist() == [0.0, 0.0]
    assert base.scale_tril.diagonal()[1:].tolist() == [4.0, 4.0]
    assert abs(base.loc[0] - 5) < 0.2


@pytest.mark.parametrize("loc", [1.5, torch.tensor(1.5), torch.full((3,), 1.5)])
@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0), torch.full((3,), 2.0), 2 * torch.eye(3)])
def test_given(float64, loc, scale):
    base = GivenBase(loc, scale).fit(ModelDensity(linear, (DATA,)))
    assert torch.equal(base.loc, torch.full((3,), 1.5))
    assert torch.equal(base.scale_tril, 2 * torch.eye(3))
    assert base.loc.dtype == base.scale_tril.dtype == torch.float64


def test_given_keeps_the_correlations(float64):
    base = GivenBase(LOC, TRIL).fit(ModelDensity(linear, (DATA,)))
    assert torch.equal(base.scale_tril, TRIL)
    base.loc.zero_()
    assert float(LOC[0]) == 0.5  # a copy


@pytest.mark.parametrize(
    ("loc", "scale", "message"),
    [
        (torch.zeros(2), 1.0, r"expected loc of shape \(\) or \(3,\), found \(2,\)"),
        (torch.zeros(1, 3), 1.0, r"expected loc of shape \(\) or \(3,\), found \(1, 3\)"),
        (0.0, torch.ones(4), r"expected scale of shape \(\), \(3,\) or \(3, 3\), found \(4,\)"),
        (0.0, torch.ones(3, 2), r"found \(3, 2\)"),
        (0.0, 0.0, "a finite scale with a positive diagonal"),
        (0.0, -1.0, "a finite scale with a positive diagonal"),
        (0.0, torch.tensor([1.0, math.nan, 1.0]), "a finite scale with a positive diagonal"),
        (0.0, math.inf, "a finite scale with a positive diagonal"),
        (math.nan, 1.0, "a finite loc"),
        (0.0, torch.ones(3, 3), "lower-triangular"),  # a covariance, most likely
    ],
)
def test_given_wrongly(float64, loc, scale, message):
    with pytest.raises(ValueError, match=message):
        GivenBase(loc, scale).fit(ModelDensity(linear, (DATA,)))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # in forward mode
@pytest.mark.parametrize(
    "base", [PriorBase(), LaplaceBase(), BatchAndMatchBase(num_batches=30), GivenBase(0.0, 2.0)], ids=repr
)
def test_the_untrained_guide_is_the_base(float64, base):
    guide = AutoDiffusion(linear, base=base, num_steps=8, architecture=MLP(width=16, depth=1))
    guide(DATA)
    law = dist.MultivariateNormal(guide.base_loc, scale_tril=guide.base_scale_tril)
    drawn = guide.get_posterior().sample((10,))
    z = torch.randn(10, 3)
    torch.testing.assert_close(guide.get_posterior().log_prob(z), law.log_prob(z), rtol=1e-10, atol=1e-10)
    assert drawn.shape == (10, 3)


def test_moments_have_a_covariance_where_there_is_one():
    torch.manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 20.0, 3.0])
    independent = 5 + scale * torch.randn(2000, 4)
    found = moments_of(independent)
    torch.testing.assert_close(found.loc, independent.mean(0))
    torch.testing.assert_close(found.scale_tril.diagonal(), independent.std(0, correction=0), rtol=1e-2, atol=0)
    root = torch.tensor([[1.0, 0, 0, 0], [0.3, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    correlated = moments_of(scale * (torch.randn(2000, 4) @ root.T))
    covariance = correlated.scale_tril @ correlated.scale_tril.T / (scale[:, None] * scale)
    torch.testing.assert_close(covariance, root @ root.T, rtol=0, atol=0.12)
    assert abs(float(correlated.scale_tril[1, 0])) > 0.2
    one = moments_of(torch.cat([scale * torch.randn(2000, 4), -scale * torch.randn(2000, 4)]), isotropic=True)
    assert torch.equal(one.loc, torch.zeros(4))
    torch.testing.assert_close(one.scale_tril, scale.square().mean().sqrt() * torch.eye(4), rtol=0.1, atol=0)


def test_a_base_that_fits_is_left_alone():
    torch.manual_seed(0)
    u = torch.randn(2000, 5)
    assert fits(u)
    assert fits(0.5 * u + 1)
    assert not fits(u + torch.tensor([0.0, 0, 0, 0, 2]))
    assert not fits(u * torch.tensor([1.0, 1, 1, 1, 0.2]))
    assert not fits(3 * u)
    # Narrow in no latent, but between two of them.
    u[:, 1] = u[:, 0] + 0.1 * u[:, 1]
    assert float(u.std(0).min()) > 0.9
    assert not fits(u)


@pytest.mark.parametrize(("dim", "factor"), [(3, 1.2), (10, 1.2), (16, 1.125), (40, 1.05)])
def test_how_much_wider_than_its_fit_a_matched_base_is(dim, factor):
    """A fifth in up to ten latents, and then less, so that it costs two nats at most."""

    def model():
        pyro.sample("x", dist.Normal(0.0, torch.arange(1.0, dim + 1)).to_event(1))

    density, found = ModelDensity(model), []
    for inflate in (1.0, None):
        torch.manual_seed(0)
        found.append(BatchAndMatchBase(num_batches=4, inflate=inflate).fit(density).scale_tril)
    torch.testing.assert_close(found[1], factor * found[0])


@pytest.mark.parametrize(("dim", "rank"), [(20, None), (200, None), (201, 14)])
def test_a_matched_base_is_full_in_up_to_two_hundred_latents_and_is_matched_to_many_scores(monkeypatch, dim, rank):
    """To four times as many as latents, or 128."""

    def model():
        pyro.sample("x", dist.Normal(0.0, torch.ones(dim)).to_event(1))

    starts, sizes = [], []

    def batch_and_match(density, start, **options):
        starts.append(start)
        return BatchAndMatchFit(start, torch.zeros(1), torch.zeros(1), 0)

    def match_to_rest(density, start, *, batch_size):
        sizes.append(batch_size)
        return start

    monkeypatch.setattr("pyro_sm.guides.bases.batch_and_match", batch_and_match)
    monkeypatch.setattr("pyro_sm.guides.bases.match_to_rest", match_to_rest)
    monkeypatch.setattr("pyro_sm.guides.bases.start_at_mode", lambda density, start, batch_size: start)
    BatchAndMatchBase().fit(ModelDensity(model))
    (start,) = starts
    assert isinstance(start, Gaussian) == (rank is None)
    assert rank is None or start.factor.shape == (dim, rank)
    assert sizes == [max(4 * dim, 128)]
