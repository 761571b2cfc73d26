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
# # Finding all the modes
#
# <!--
# SPDX-License-Identifier: Apache-2.0
# -->
#
# A hundred and twenty Gaussians in the plane, of equal weight, known to a sampler only as a log density. Pyro's
# guides settle on a few of them, NUTS stays where it starts. This notebook lets three samplers look for them at the
# same number of evaluations of the density: a mean-field guide, tempered sequential Monte Carlo, and the diffusion
# sampler; exact draws set the floor that no figure can beat. Then a real problem with eight narrow, curved modes:
# sensors to be located from noisy distances. About two minutes on two cores.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib
import pyro
import torch
from matplotlib.figure import Figure

matplotlib.use("Agg")

import pyro_sm
from pyro_sm.density import FunctionDensity
from pyro_sm.examples.improper import factor_model
from pyro_sm.gaussians.gaussian import GaussianDensity
from pyro_sm.smc import TemperedSMC
from pyro_sm.targets import GaussianMixture, SensorNetwork

torch.set_num_threads(1)
FIGURES = Path(os.environ.get("PYRO_SM_FIGURES") or tempfile.mkdtemp())
BUDGET = 40_000

# %% [markdown]
# ## The target, as an ordinary Pyro model
#
# `factor_model` writes what a user would write: an improper flat prior and `pyro.factor`. A flat prior says nothing
# about where to look, so the sampler is told by its base: a Gaussian that covers the square.

# %%
target = GaussianMixture(120)
model = factor_model(target.log_prob, target.dim)
loc, scale = target.start.loc, target.start.scale
print("start:", loc.tolist(), scale.tolist())

# %%
sampler = pyro_sm.DiffusionSampler(
    model,
    base=pyro_sm.GivenBase(loc, scale),
    stopping=pyro_sm.StoppingRule(max_evaluations=BUDGET),
    disable_progbar=True,
)
sampler.run()
print(sampler.report())

# %% [markdown]
# ## At the same number of evaluations
#
# Modes are counted by the nearest mean; the figure that shows coverage is the total variation between the shares of
# draws and those of exact draws, `½ Σ |ŵ_k − w_k|`. Ten thousand draws each.

# %%
draws = {"DiffusionSampler": sampler.get_samples(10_000)["x"]}
density = FunctionDensity(target.log_prob, 2)
torch.manual_seed(0)
particles = TemperedSMC(num_particles=2300, num_moves=8).run(density, GaussianDensity(loc, torch.diag(scale)))
print(f"tempered SMC: {density.evaluations.values} evaluations")
draws["tempered SMC"] = particles.z[torch.randint(len(particles.z), (10_000,))]

pyro.set_rng_seed(0)
pyro.clear_param_store()
location = torch.nn.Parameter(loc.clone())
log_scale = torch.nn.Parameter(scale.log().clone())
optimiser = torch.optim.Adam([location, log_scale], lr=0.05)
for _ in range(BUDGET // 32):  # AutoNormal by Trace_ELBO; written out, as Pyro cannot start it from a flat prior
    z = location + log_scale.exp() * torch.randn(32, 2)
    loss = -(target.log_prob(z) + log_scale.sum()).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
with torch.no_grad():
    draws["mean-field ELBO"] = location + log_scale.exp() * torch.randn(10_000, 2)
draws["exact"] = target.sample(10_000, torch.Generator().manual_seed(5))
for name, x in draws.items():
    found = int((target.mode_shares(x) > 0.1 / 120).sum())
    print(f"{name:18s} modes {found:3d} of 120, total variation {target.mode_total_variation(x):.3f}")

# %%
figure = Figure(figsize=(11, 3.2), layout="constrained")
axes = figure.subplots(1, 4, sharex=True, sharey=True)
side = torch.linspace(-46, 46, 240)
surface = target.log_prob(torch.cartesian_prod(side, side)).reshape(240, 240).T
for ax, (name, x) in zip(axes, draws.items(), strict=True):
    ax.contour(side, side, surface, levels=[-12, -10, -8], colors="#BBBBBB", linewidths=0.6)
    ax.plot(*x[:4000].T, ".", ms=1.2, color="#0072B2", alpha=0.5)
    ax.set(title=name, aspect="equal", xticks=[-40, 0, 40], yticks=[-40, 0, 40])
figure.savefig(FIGURES / "modes-120.png", dpi=120)

# %% [markdown]
# ![A mixture of 120: three samplers at equal evaluations, and exact draws](images/modes-120.png)

# %% [markdown]
# The trained sampler goes on drawing for the price of a network pass; the others would have to start again.
#
# ## Sensors
#
# Four sensors in the plane, two more at known places; some of the distances are known to two hundredths, and that the
# others were *not* received says something too. Reflections are left open: eight configurations, each a thin curved
# shell in eight dimensions. Of thousands of draws of a covering Gaussian one or two have any weight, so there is
# nothing for the weights to teach. Here the sampler learns from a *population*: particles seeded by tempered
# sequential Monte Carlo, moved in every round, and corrected by exchange with the sampler's own draws. It is there by
# itself where the first round's weights have a Pareto k̂ beyond all use, as here.

# %%
network = SensorNetwork()
sampler = pyro_sm.DiffusionSampler(
    factor_model(network.log_prob, network.dim),
    base=pyro_sm.GivenBase(network.start.loc, network.start.scale),
    stopping=pyro_sm.StoppingRule(max_evaluations=120_000),
    disable_progbar=True,
)
sampler.run()
print(sampler.report())
print(f"log evidence of a long importance sampling run: {network.log_evidence:.3f}")
places = sampler.get_samples(8000)["x"]
shares = network.configuration_shares(places)
print("configurations, found:    ", [round(float(w), 3) for w in shares])
print("configurations, reference:", [round(float(w), 3) for w in network.mode_weights()])

# %%
figure = Figure(figsize=(8, 4), layout="constrained")
left, right = figure.subplots(1, 2)
for sensor, colour in enumerate(("#0072B2", "#D55E00", "#009E73", "#CC79A7")):
    some = places[:3000, 2 * sensor : 2 * sensor + 2]
    left.plot(*some.T, ".", ms=1.5, alpha=0.4, color=colour)
    left.plot([], [], "o", ms=5, color=colour, label=f"sensor {sensor + 1}")
left.plot(*network.known.T, "k^", ms=7, label="known")
left.set(title="posterior of the four places", xlim=(-1.2, 2), ylim=(-1.2, 2), aspect="equal")
left.legend(frameon=False, fontsize=8, loc="upper left")
position = torch.arange(8)
right.bar(position - 0.2, network.mode_weights(), 0.4, color="#BBBBBB", label="reference")
right.bar(position + 0.2, shares, 0.4, color="#0072B2", label="DiffusionSampler")
right.set(title="weights of the configurations", xlabel="configuration", xticks=position.tolist())
right.set_ylim(0, 0.2)
right.legend(frameon=False, loc="upper left", ncol=2)
figure.savefig(FIGURES / "modes-sensors.png", dpi=120)

# %% [markdown]
# ![Eight configurations of a sensor network](images/modes-sensors.png)

# %% [markdown]
# Why not weights alone? In many dimensions they would do worse than fail. Damped weights count the mode that the
# sampler knows better for more than it is worth, round after round: the others are lost, and the weights that are
# left look fine. `python -m pyro_sm bench targets --targets many-well-32 --methods iwsm smc --evaluations 250000`
# runs sixteen double wells with the population.
#
# Sources: "Flow Annealed Importance Sampling Bootstrap" (https://arxiv.org/abs/2208.01893) for the Gaussians;
# "A Repelling-Attracting Metropolis Algorithm for Multimodality" (https://arxiv.org/abs/1601.05633) for the sensors;
# "Importance Weighted Score Matching for Diffusion Samplers with Enhanced Mode Coverage"
# (https://arxiv.org/abs/2505.19431).
