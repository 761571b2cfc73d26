# SPDX-License-Identifier: Apache-2.0
"""What tests compare with: laws whose denoiser is known, quadrature, paths by a plain loop, a density with its Z."""

import math

import numpy as np
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from pyro_sm.density import FunctionDensity
from pyro_sm.diffusion.denoiser import Denoiser
from pyro_sm.diffusion.diffusion import Diffusion
from pyro_sm.diffusion.kernels import Kernels, gaussian_kernels
from pyro_sm.diffusion.noise_range import NoiseRange
from pyro_sm.nn.mlp import MLP

# Of `process_of` and `density_of`: the latents' base, and the evidence.
LOG_Z = -1.3
BASE_LOC = torch.tensor([2.0, -1.0], dtype=torch.float64)
BASE_TRIL = torch.tensor([[2.0, 0.0], [0.8, 1.1]], dtype=torch.float64)


class Mixture:
    """A Gaussian mixture ``Σ w_j N(m_j, S_j)`` whose denoiser is known at every noise ratio."""

    def __init__(self, weights, means, covariances):
        self.weights, self.means, self.covariances = (
            torch.tensor(x, dtype=torch.float64) for x in (weights, means, covariances)
        )
        self.dim = self.means.shape[1]
        self.values, self.vectors = torch.linalg.eigh(self.covariances)

    def law(self, r=0.0):
        noise = r**2 * torch.eye(self.dim, dtype=torch.float64)
        return MixtureSameFamily(Categorical(self.weights), MultivariateNormal(self.means, self.covariances + noise))

    def log_prob(self, u):
        return self.law().log_prob(u)

    def sample(self, num_draws):
        return self.law().sample((num_draws,))

    def moments(self, y, r):
        """``E[u | y]`` and ``Var[u | y]``, one latent at a time, both (B, D); ``r`` (B,)."""
        total = self.values + r.square()[:, None, None]
        white = torch.einsum("bjd,jde->bje", y[:, None] - self.means, self.vectors)
        log_share = self.weights.log() - 0.5 * (white.square() / total + total.log()).sum(-1)
        share = torch.softmax(log_share, 1)[..., None]
        gain = self.values / total
        mean = self.means + torch.einsum("bje,jde->bjd", gain * white, self.vectors)
        variance = r.square()[:, None, None] * torch.einsum("bje,jde->bjd", gain, self.vectors.square())
        centre = (share * mean).sum(1)
        return centre, (share * (variance + (mean - centre[:, None]).square())).sum(1)

    def network(self, x, c, context=None):
        """``F`` and ``h`` that make the denoiser exact."""
        r = torch.exp(4 * c)
        v = 1 + r[:, None].square()
        y = x * torch.sqrt(v)
        mean, variance = self.moments(y, r)
        return torch.cat(
            [(mean - y / v) * torch.sqrt(v) / r[:, None], (variance * v).log() - 2 * r[:, None].log()], -1
        )

    def denoiser(self):
        return Denoiser(self.network)


def two_modes():
    """Asymmetric, correlated, overlapping a little."""
    return Mixture(
        [0.3, 0.7], [[-1.2, 0.5], [0.8, -0.4]], [[[0.30, 0.12], [0.12, 0.20]], [[0.25, -0.10], [-0.10, 0.45]]]
    )


def random_network(dim, scale=0.3, *, context_dim=0):
    """A small untrained network that is not zero."""
    network = MLP(width=16, depth=1).build(dim, 2 * dim, context_dim).double()
    for layer in (network.last, network.skip):
        torch.nn.init.normal_(layer.weight, std=scale / layer.in_features**0.5)
        torch.nn.init.normal_(layer.bias, std=scale)
    return network.requires_grad_(False)


def zero_network(dim):
    return MLP(width=16, depth=1).build(dim, 2 * dim, 0).double().requires_grad_(False)


def gauss_hermite(n):
    """Nodes and weights (n,) of the expectation under N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights) / math.sqrt(2 * math.pi)


def levels(num_steps=7, noise=None):
    return (noise or NoiseRange(0.05, 6.0)).levels(num_steps, dtype=torch.float64, device=torch.device("cpu"))


def fitted_kernels(ratios, dim=2):
    """Kernels with factors and a start of their own, as after a fit."""
    num_steps = ratios.shape[0] - 1
    factor = 1.2 + 0.5 * torch.rand(num_steps, dim, dtype=torch.float64)
    loc = torch.linspace(-0.3, 0.5, dim, dtype=torch.float64)
    scale = torch.sqrt(torch.linspace(0.9, 1.6, dim, dtype=torch.float64) + ratios[-1] ** 2)
    return Kernels(ratios, factor, loc, scale)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def replay(denoiser, kernels, noise, wrong=None):
    """``u``, ``R`` and the forward noise of a path, by a plain loop over torch.distributions.

    ``wrong`` names a mistake to make in ``R``; the path stays the same.
    """
    r = kernels.ratios
    num_steps = len(r) - 1
    start = Normal(kernels.start_loc, kernels.start_scale)
    y = kernels.start_loc + kernels.start_scale * noise[num_steps]
    total = torch.zeros(noise.shape[1], dtype=torch.float64)
    if wrong != "no start":
        total -= start.log_prob(y).sum(-1)
    forward_noise = []
    for k in range(num_steps, 0, -1):
        mean, variance = denoiser.moments(y, r[k])
        c = 1 - r[k - 1] ** 2 / r[k] ** 2
        spread = torch.sqrt(r[k - 1] ** 2 * c + c**2 * kernels.variance_factor[k - 1] * variance)
        reverse = Normal(y + c * (mean - y), spread)
        new = reverse.mean + spread * noise[k - 1]
        gap = torch.sqrt(r[k] ** 2 - r[k - 1] ** 2)
        step = Normal(new, r[k] - r[k - 1] if wrong == "g for g²" else gap)
        log_reverse = reverse.log_prob(new)
        if wrong == "no scale":
            log_reverse = log_reverse + spread.log()
        if wrong == "no factor":
            plain = torch.sqrt(r[k - 1] ** 2 * c + c**2 * variance)
            log_reverse = Normal(reverse.mean, plain).log_prob(new)
        if wrong == "no V" and k > 1:
            log_reverse = Normal(reverse.mean, torch.sqrt(r[k - 1] ** 2 * c)).log_prob(new)
        total = total + (step.log_prob(y) - log_reverse).sum(-1)
        forward_noise.insert(0, (y - new) / gap)
        y = new
    return y, total, torch.stack(forward_noise)


def process_of(denoiser, **kernels):
    levels = NoiseRange(0.1, 5.0).levels(8, dtype=torch.float64, device=torch.device("cpu"))
    return Diffusion(denoiser, gaussian_kernels(levels, 2)._replace(**kernels), BASE_LOC, BASE_TRIL)


def density_of(process, law):
    """``Z`` times the law, given in whitened space, as a density of latents."""

    def log_prob(z):
        u = process.to_white(z)
        return LOG_Z + law.log_prob(u) - process.log_det(u)

    return FunctionDensity(log_prob, 2, dtype=torch.float64)


def diffusion_explicit(score, target, matrix):
    """``½ ‖mᵀ(s − ∇log p)‖²`` (B,): what diffusion score matching is up to a constant; ``matrix``: m (B, D, D)."""
    return 0.5 * (matrix.mT @ (score - target)[..., None]).squeeze(-1).square().sum(-1)
