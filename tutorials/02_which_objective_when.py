# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which objective when
#
# <!--
# SPDX-License-Identifier: Apache-2.0
# -->
#
# `SVI(model, guide, optim, loss)` takes `Trace_ELBO` or any of the objectives here. They differ in what they need,
# what they cost, and what they cannot see. This notebook shows each on problems whose answer is known: what a guide
# that is too simple ends up as; what happens to the weights of separated modes; and what a real posterior says.
#
# About two minutes on two cores. Pictures go to the folder `PYRO_SM_FIGURES` if that is set.

# %%
import math
import os
import tempfile
import warnings
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, init_to_mean
from pyro.optim import ClippedAdam

warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
matplotlib.use("Agg")

import pyro_sm
from pyro_sm.examples.posteriors import posteriors
from pyro_sm.guides import BatchAndMatch
from pyro_sm.guides.mixture import AutoGaussianMixture
from pyro_sm.objectives import FisherDivergence, Identity, MixtureFisherDivergence, SteinDiscrepancy

torch.set_num_threads(1)
FIGURES = Path(os.environ.get("PYRO_SM_FIGURES") or tempfile.mkdtemp())
COLOURS = {"blue": "#0072B2", "orange": "#D55E00", "green": "#009E73", "purple": "#CC79A7", "grey": "#999999"}


def train(model, guide, loss, steps, lr=0.03, lrd=0.995, watch=None):
    """SVI with a decaying learning rate; `watch(guide)` is recorded at every step."""
    svi = SVI(model, guide, ClippedAdam({"lr": lr, "lrd": lrd}), loss)
    seen = []
    for _ in range(steps):
        svi.step()
        if watch is not None:
            seen.append(watch(guide))
    return seen


# %% [markdown]
# ## A guide that is too simple
#
# A correlated Gaussian, and a guide without correlations. Every divergence has its own idea of the best variance:
#
# | objective | variance found |
# |---|---|
# | `Trace_ELBO()` (reverse KL) | $1-\rho^2$ |
# | `FisherDivergence(metric=Identity())` | $(1-\rho^2)/\sqrt{1+\rho^2}$ |
# | `FisherDivergence()` (base space) | $(1-\rho^2)/(1+\rho^2)$ |
#
# Score divergences are narrower still than the ELBO. What repairs this is not another objective but a guide that can
# turn: with `AutoMultivariateNormal` all three find the truth.

# %%
RHO = 0.8
covariance = torch.tensor([[1.0, RHO], [RHO, 1.0]])


def correlated():
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))


objectives = {
    "Trace_ELBO": (Trace_ELBO(num_particles=64, vectorize_particles=True), 1 - RHO**2),
    "FisherDivergence, identity": (FisherDivergence(64, metric=Identity()), (1 - RHO**2) / math.sqrt(1 + RHO**2)),
    "FisherDivergence, base space": (FisherDivergence(64), (1 - RHO**2) / (1 + RHO**2)),
}
mean_field = {}
for name, (loss, expected) in objectives.items():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AutoDiagonalNormal(correlated, init_loc_fn=init_to_mean, init_scale=0.7)
    train(correlated, guide, loss, 400)
    mean_field[name] = float(guide.get_posterior().variance.detach().mean())
    print(f"{name:30s} variance {mean_field[name]:.3f}   formula {expected:.3f}")

# %%
figure = Figure(figsize=(4.5, 4), layout="constrained")
ax = figure.subplots()
angle = torch.linspace(0, 2 * math.pi, 200)
circle = torch.stack([angle.cos(), angle.sin()], 1)
true = circle @ torch.linalg.cholesky(covariance).T
ax.plot(true[:, 0], true[:, 1], color="black", label="target, 1 sd")
for (name, variance), colour in zip(mean_field.items(), COLOURS.values(), strict=False):
    ring = circle * math.sqrt(variance)
    ax.plot(ring[:, 0], ring[:, 1], color=colour, label=name)
ax.set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal", ylim=(-1.4, 2.1), title="Mean field: every divergence differs")
ax.legend(frameon=False, fontsize=8, loc="upper left")
figure.savefig(FIGURES / "objectives-mean-field.png", dpi=120)

# %% [markdown]
# ![A mean-field guide on a correlated normal, by three objectives](images/objectives-mean-field.png)

# %% [markdown]
# ## Two modes: blindness
#
# A target with modes at −6 and 6 of weights .2 and .8, and a guide that can represent it: a mixture of two Gaussians,
# started with half of the weight on either. The Fisher divergence compares *slopes* of the log density. Where the
# modes are so far apart that nothing lies between them, the slopes do not know the weights.
#
# Two repairs. The Sobolev term adds the variance of `log p̃ − log q` under the guide: another constant on every mode
# is seen at once. The mixture divergence mixes guide and target with a broad density `m` that connects the modes (and
# needs `log Z`, which it estimates by importance sampling). The kernel Stein discrepancy compares slopes too, and is
# as blind.


# %%
def two_modes():
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 6.0))
    left = math.log(0.2) + dist.Normal(-6.0, 1.0).log_prob(z)
    right = math.log(0.8) + dist.Normal(6.0, 1.0).log_prob(z)
    pyro.factor("modes", torch.logsumexp(torch.stack([left, right]), 0) - dist.Normal(0.0, 6.0).log_prob(z))


runs = {
    "FisherDivergence()": FisherDivergence(64),
    "SteinDiscrepancy()": SteinDiscrepancy(num_draws=64),
    "FisherDivergence(sobolev=.5)": FisherDivergence(64, sobolev=0.5),
    "MixtureFisherDivergence()": MixtureFisherDivergence(128),
}
weights = {}
for name, loss in runs.items():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AutoGaussianMixture(two_modes, 2, init_locs=torch.tensor([[-6.0], [6.0]]), init_scale=1.0)
    weights[name] = train(two_modes, guide, loss, 500, watch=lambda g: float(g.components()[0][0].detach().exp()))
    print(f"{name:30s} weight of the left mode {weights[name][-1]:.3f}   true .200")

# %%
figure = Figure(figsize=(6.5, 3.4), layout="constrained")
ax = figure.subplots()
ax.axhline(0.2, color="black", lw=1, ls=":", label="true")
for (name, path), colour in zip(weights.items(), COLOURS.values(), strict=False):
    ax.plot(path, color=colour, label=name)
ax.set(xlabel="step", ylabel="weight of the left mode", ylim=(0, 0.62), title="Two separated modes")
ax.legend(frameon=False, fontsize=8, loc="lower right", ncol=2)
figure.savefig(FIGURES / "objectives-two-modes.png", dpi=120)

# %% [markdown]
# ![Weights of two modes under four objectives](images/objectives-two-modes.png)

# %% [markdown]
# All of these *start on* the modes. None of them finds a mode that the guide does not touch: expectations are taken
# over the guide's own draws. Finding modes is what the diffusion sampler is for: it starts as the prior, which covers
# both, and its weights see what is missing. Nothing tells it where the modes are.

# %%
pyro.set_rng_seed(0)
pyro.clear_param_store()
guide = pyro_sm.AutoDiffusion(two_modes)
loss = pyro_sm.ImportanceWeightedScoreMatching()
train(two_modes, guide, loss, 300, lr=1e-3, lrd=1.0)
idata = pyro_sm.to_arviz(two_modes, guide, objective=loss)
share = float((idata.posterior["z"] < 0).mean())
attrs = idata.posterior.attrs
print(
    f"AutoDiffusion: weight of the left mode {share:.3f}, log Z {attrs['log_evidence']:.3f} "
    f"± {attrs['log_evidence_se']:.3f} (true 0), k-hat {attrs['pareto_khat']:.2f}"
)

# %% [markdown]
# ## A real posterior
#
# A regression as one writes it first: children's test scores on their mothers' IQ, the covariates as they come, flat
# priors. The posterior is a correlated Gaussian, nearly; but its standard deviations span three orders of magnitude,
# and it is far from where guides start. The same guide, `AutoMultivariateNormal`, fitted three ways with the
# same number of gradient evaluations (the Fisher divergence differentiates each score once more, and is charged
# double). Errors are in standard deviations of the reference draws.
#
# `python -m pyro_sm bench gaussian-guides` does this for all fifteen posteriors of the suite.

# %%
posterior = posteriors()["kidiq-kidscore_interaction"]
EVALUATIONS = 8000
torch.set_default_dtype(torch.float64)  # the design is too badly conditioned for less


def fit(way):
    """An `AutoMultivariateNormal` fitted to the posterior."""
    guide = AutoMultivariateNormal(posterior.model, init_loc_fn=init_to_origin)
    guide(*posterior.args)
    if way == "Batch-and-Match":
        result = BatchAndMatch(num_batches=EVALUATIONS // 32 - 8).fit(guide, *posterior.args)
        print(
            "   evaluations:", result.evaluations.scores, " divergence of the last batch:", float(result.fisher[-1])
        )
        return guide
    loss = Trace_ELBO(num_particles=16, vectorize_particles=True) if way == "Trace_ELBO" else FisherDivergence(16)
    steps = EVALUATIONS // (16 if way == "Trace_ELBO" else 32)
    svi = SVI(posterior.model, guide, ClippedAdam({"lr": 0.1, "lrd": 0.02 ** (1 / steps)}), loss)
    for _ in range(steps):
        svi.step(*posterior.args)
    return guide


def init_to_origin(site):
    """Where Pyro's guides would start if the flat priors could be drawn from: zero, unconstrained."""
    return torch.distributions.transform_to(site["fn"].support)(torch.zeros(site["fn"].shape()))


for way in ("Trace_ELBO", "FisherDivergence", "Batch-and-Match"):
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = fit(way)
    idata = pyro_sm.to_arviz(
        posterior.model, guide, *posterior.args, num_samples=4000, correction=pyro_sm.NoCorrection()
    )
    samples = {name: torch.as_tensor(x.values).flatten(0, 1) for name, x in idata.posterior.data_vars.items()}
    worst, attrs = posterior.errors(samples), idata.posterior.attrs
    print(f"{way:18s} worst error: mean {worst.mean:8.3f} sd, sd {worst.sd:6.3f};  k-hat {attrs['pareto_khat']:.2f}")
torch.set_default_dtype(torch.float32)

# %% [markdown]
# ## In short
#
# | you have | use |
# |---|---|
# | one bump, and want a quick Gaussian | `BatchAndMatch().fit(guide, *args)`, or `Trace_ELBO` |
# | a richer guide with a log density, started near the posterior | `FisherDivergence()` |
# | the same, and separated modes that it touches | `FisherDivergence(sobolev=...)`, `MixtureFisherDivergence()` |
# | a guide that can be drawn from, but has no density | `SteinDiscrepancy()` |
# | several modes, and do not know where | `AutoDiffusion` with `ImportanceWeightedScoreMatching()` |
# | draws of MCMC, and want the evidence or more draws | `AutoDiffusion` with `DrawsScoreMatching(draws)` |
# | data and an unnormalised model | `ImplicitScoreMatching()`, `DenoisingScoreMatching(sigma)` |
# | the same, in separated parts | `BridgeDensityEstimation(bridge)` |
