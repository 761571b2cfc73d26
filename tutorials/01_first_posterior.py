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
# # A first posterior
#
# <!--
# SPDX-License-Identifier: Apache-2.0
# -->
#
# You have a Pyro model and an SVI script. This notebook changes two lines of it, gets draws of the posterior that
# can be used without weights, and reads off whether to trust them. Then it does the same for a posterior with two
# modes, which a Gaussian guide cannot represent.
#
# It takes a minute or two on two cores. `jupytext --to notebook tutorials/01_first_posterior.py` makes a notebook of
# it; as a script it runs as it stands, and writes its pictures to the folder `PYRO_SM_FIGURES` if that is set.

# %%
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
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
matplotlib.use("Agg")

import pyro_sm
from pyro_sm.diagnostics import plot_raw_vs_weighted, plot_training, summary_table
from pyro_sm.examples import eight_schools

# Two threads help on an idle machine and hurt on a busy one; one is never bad.
torch.set_num_threads(1)
FIGURES = Path(os.environ.get("PYRO_SM_FIGURES") or tempfile.mkdtemp())

# %% [markdown]
# ## Before: mean-field SVI
#
# Eight schools, non-centred. Reference draws exist for it, so every number below can be checked:
# `eight_schools.errors` gives the worst error of the ten means and of the ten standard deviations, in reference
# standard deviations.

# %%
y, sigma = eight_schools.data()
model = eight_schools.noncentered

pyro.set_rng_seed(0)
pyro.clear_param_store()
guide = AutoNormal(model)
svi = SVI(model, guide, Adam({"lr": 2e-2}), loss=Trace_ELBO(num_particles=8, vectorize_particles=True))
for _ in range(800):
    svi.step(y, sigma)


def by_site(idata):
    """The posterior group as tensors by site, sample dimension first."""
    return {name: torch.as_tensor(x.values).flatten(0, 1) for name, x in idata.posterior.data_vars.items()}


raw = pyro_sm.to_arviz(model, guide, y, sigma, num_samples=4000, correction=pyro_sm.NoCorrection())
print("AutoNormal:", eight_schools.errors(by_site(raw)))

# %% [markdown]
# ## After: two lines
#
# `AutoDiffusion` in the place of `AutoNormal`, `ImportanceWeightedScoreMatching` in the place of `Trace_ELBO`. The
# loss is that of a regression, counted from the untrained guide: it starts at 0 and falls while the guide learns, but
# it does not bound the evidence. The evidence is estimated by the weights of every round: see `loss.history`.

# %%
pyro.set_rng_seed(0)
pyro.clear_param_store()
guide = pyro_sm.AutoDiffusion(model)
loss = pyro_sm.ImportanceWeightedScoreMatching()
svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=loss)
for step in range(600):
    value = svi.step(y, sigma)
    if step % 100 == 0:
        info = loss.history[-1]
        print(f"step {step}: loss {value:.3f}, log evidence {info.log_evidence:.3f}, effective share {info.ess:.2f}")

# %% [markdown]
# `to_arviz` draws from the guide, weights the draws, resamples them, and puts everything where ArviZ looks for it:
# the group `posterior` is corrected already, the raw draws and their weights are in the group `guide`.

# %%
idata = pyro_sm.to_arviz(model, guide, y, sigma, objective=loss)
print(summary_table(idata, ["mu", "tau", "theta"]))
trust = {k: idata.posterior.attrs[k] for k in ("pareto_khat", "importance_ess", "log_evidence", "log_evidence_se")}
print(trust)
print("AutoDiffusion:", eight_schools.errors(by_site(idata)))
print(f"exact log evidence {eight_schools.reference().log_evidence:.3f}")

# %% [markdown]
# How to read it: `pareto_khat` below 0.7 says that averages over the weighted draws can be trusted;
# `importance_ess` is the share of the raw draws that the weights leave effective; the evidence comes with its
# standard error. A tenth of the draws come from the model's own prior, so that the weights are bounded by the
# likelihood and a mode the guide has lost can be seen. What they cannot tell is whether a mode was missed that not
# one of those draws reached either.

# %%
plot_raw_vs_weighted(idata, ["mu", "tau"]).savefig(FIGURES / "first-posterior-pairs.png", dpi=100)

# %% [markdown]
# ![Raw and weighted draws of mu and tau](images/first-posterior-pairs.png)

# %% [markdown]
# ## Two modes
#
# A quantity seen only through its square. The prior leans to the right, so the two modes have unequal weight, which
# a grid gives exactly. Here `DiffusionSampler` writes the loop: progress, stopping rule, budget, Ctrl-C, resume.


# %%
def squared(observed):
    x = pyro.sample("x", dist.Normal(0.5, 2.0))
    pyro.sample("square", dist.Normal(x**2, 1.0), obs=observed)


observed = torch.tensor(6.0)
grid = torch.linspace(-6, 6, 4001)
log_joint = dist.Normal(0.5, 2.0).log_prob(grid) + dist.Normal(grid**2, 1.0).log_prob(observed)
log_evidence = torch.logsumexp(log_joint, 0) + torch.log(grid[1] - grid[0])
density = (log_joint - log_evidence).exp()
exact_right = float(torch.trapezoid(density[grid > 0], grid[grid > 0]))

sampler = pyro_sm.DiffusionSampler(
    squared, stopping=pyro_sm.StoppingRule(max_evaluations=40_000), disable_progbar=True
)
sampler.run(observed)
samples = sampler.get_samples(4000)
print(sampler.report())
print(f"exact log evidence {float(log_evidence):.3f}")
print(f"weight of the right mode {float((samples['x'] > 0).float().mean()):.3f} (exact {exact_right:.3f})")

# %%
pyro.clear_param_store()
gaussian = AutoNormal(squared)
svi = SVI(squared, gaussian, Adam({"lr": 2e-2}), loss=Trace_ELBO(num_particles=8, vectorize_particles=True))
for _ in range(800):
    svi.step(observed)
low, middle, high = (float(gaussian.quantiles([p])["x"]) for p in (0.16, 0.5, 0.84))
loc, scale = middle, (high - low) / 1.989  # a Gaussian, read off its quantiles

figure = Figure(figsize=(7, 3.5), layout="constrained")
ax = figure.subplots()
ax.hist(
    samples["x"].numpy(), bins=120, range=(-6, 6), density=True, color="#56B4E9", label="DiffusionSampler, 4000 draws"
)
ax.plot(grid, density, color="black", lw=1.2, label="exact")
ax.plot(
    grid, dist.Normal(loc, scale).log_prob(grid).exp().detach(), color="#D55E00", lw=1.2, ls="--", label="AutoNormal"
)
ax.set(xlabel="x", ylabel="posterior density", ylim=(0, 2))
ax.legend(frameon=False)
figure.savefig(FIGURES / "first-posterior-two-modes.png", dpi=100)

# %% [markdown]
# ![Draws of a posterior with two modes, and its exact density](images/first-posterior-two-modes.png)

# %% [markdown]
# The run itself: damping exponent, effective share and evidence against density evaluations.

# %%
plot_training(sampler.history).savefig(FIGURES / "first-posterior-training.png", dpi=100)

# %% [markdown]
# ![Effective share, k̂ and evidence, round by round](images/first-posterior-training.png)
