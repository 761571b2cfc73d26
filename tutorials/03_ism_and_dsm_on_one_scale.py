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
# # Implicit and denoising score matching on one scale
#
# <!--
# SPDX-License-Identifier: Apache-2.0
# -->
#
# Both fit the slope of a log density to data, and both leave out a constant that does not depend on the model: not
# the same one. As they are usually written, the numbers of one say nothing about those of the other. With the
# constants put back,
#
# $$J_\mathrm{ESM} = \tfrac12 E\|s-\nabla\log p\|^2 = J_\mathrm{ISM} + \tfrac12 I(p), \qquad
# J_\mathrm{DSM} = J^\sigma_\mathrm{ISM} + \frac{D}{2\sigma^2},$$
#
# where $I(p)=E\|\nabla\log p\|^2$ and $J^\sigma$ is the loss on the data with noise of size $\sigma$. Every objective
# here returns its value on the scale of $J_\mathrm{ISM}$; `explicit_loss(value, information)` puts the last constant
# back, and then zero is the truth.
#
# This notebook looks at three things: what one row of data costs in variance; the two losses laid over each other;
# and which of them generalises better from few data. A minute or two on two cores.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints

matplotlib.use("Agg")

from pyro_sm.objectives import DenoisingScoreMatching, ImplicitScoreMatching, gaussian_information, no_guide
from pyro_sm.objectives.energies.score_estimation import (
    denoising,
    denoising_centred,
    denoising_controlled,
    explicit,
    implicit,
)

torch.set_num_threads(1)
FIGURES = Path(os.environ.get("PYRO_SM_FIGURES") or tempfile.mkdtemp())
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"

# %% [markdown]
# ## What one row of data tells, and how noisily
#
# Standard normal data in five dimensions, and the model at the truth, $s(x)=-x$. Every estimator has the same mean,
# up to its constant; their standard deviations differ by orders of magnitude. The denoising loss as it is usually
# written is hopeless at small noise: it is the constant $\|\varepsilon\|^2/2\sigma^2$ that fluctuates. Without it the
# deviation still grows as $1/\sigma$. The control variate $s(x)\cdot\varepsilon/\sigma$, of mean zero, removes that.

# %%
torch.manual_seed(0)
D, ROWS = 5, 200_000
x, noise = torch.randn(2, ROWS, D, dtype=torch.float64)
sigmas = torch.logspace(-2, 0, 13).tolist()
curves = {
    name: [] for name in ("implicit", "denoising", "denoising, less its constant", "with control variate", "explicit")
}
for sigma in sigmas:
    y = x + sigma * noise
    curves["implicit"].append(implicit(-y, torch.full((ROWS,), -float(D), dtype=y.dtype)).std())
    curves["denoising"].append(denoising(-y, noise, sigma).std())
    curves["denoising, less its constant"].append(denoising_centred(-y, noise, sigma).std())
    curves["with control variate"].append(denoising_controlled(-y, -x, noise, sigma).std())
    curves["explicit"].append(explicit(-y, -y / (1 + sigma**2)).std())
print("sigma  " + "  ".join(f"{name:>28s}" for name in curves))
for i in range(0, len(sigmas), 4):
    print(f"{sigmas[i]:5.2f}  " + "  ".join(f"{float(path[i]):28.3f}" for path in curves.values()))

figure = Figure(figsize=(6, 3.6), layout="constrained")
ax = figure.subplots()
for (name, path), colour in zip(curves.items(), (BLUE, GREY, PURPLE, ORANGE, GREEN), strict=True):
    ax.loglog(sigmas, path, color=colour, label=name)
ax.set(
    xlabel="noise scale $\\sigma$",
    ylabel="standard deviation per row",
    ylim=(1e-4, None),
    title="N(0, I), five dimensions, at the truth",
)
ax.legend(frameon=False, fontsize=8)
figure.savefig(FIGURES / "one-scale-variance.png", dpi=120)

# %% [markdown]
# ![Variance of the estimators against the noise](images/one-scale-variance.png)

# %% [markdown]
# ## Laid over each other
#
# Data from $N(0, \tau_0^2 I)$, the energy model $-\|x\|^2/2v$ with one parameter $v$. For every $v$ the losses are
# evaluated by the objectives (`svi.evaluate_loss`), and the constant is put back. Implicit score matching has its
# minimum at the truth. Denoising learns the density of the *noised* data: its minimum is at $\tau_0^2+\sigma^2$. Both
# minima have the value zero, and now one can see what the noise does: it flattens the valley.

# %%
TRUE = 1.0


def gaussian_energy():
    v = pyro.param("v", torch.tensor(TRUE), constraint=constraints.positive)
    x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (D,)))
    pyro.factor("f", -0.5 * x.square().sum(-1) / v)


data = TRUE**0.5 * torch.randn(20_000, D)
scales = torch.linspace(0.4, 2.6, 23)
figure = Figure(figsize=(6, 3.6), layout="constrained")
ax = figure.subplots()
losses = {"implicit": ImplicitScoreMatching()}
losses |= {f"denoising, $\\sigma={s}$": DenoisingScoreMatching(s) for s in (0.1, 0.5, 1.0)}
for (name, loss), colour in zip(losses.items(), (BLUE, ORANGE, GREEN, PURPLE), strict=True):
    information = gaussian_information(torch.eye(D) * (TRUE + loss.sigma**2))
    pyro.clear_param_store()
    svi = SVI(gaussian_energy, no_guide, Adam({"lr": 1e-2}), loss)
    svi.evaluate_loss(data)
    path = []
    for v in scales:
        pyro.get_param_store()["v"] = v
        path.append(loss.explicit_loss(svi.evaluate_loss(data), float(information)))
    ax.plot(scales, path, color=colour, label=name)
    best = int(torch.tensor(path).argmin())
    print(
        f"{name:28s} constant left out {loss.constant(D):8.2f}; "
        f"lowest {path[best]:+.3f} at v = {float(scales[best]):.2f}"
    )
v = scales
ax.plot(v, 0.5 * D * TRUE * (1 / v - 1 / TRUE) ** 2, color="black", ls=":", label="formula, no noise")
ax.axhline(0, color=GREY, lw=0.8)
ax.set(
    xlabel="variance $v$ of the model", ylabel="explicit loss", ylim=(-0.3, 3), title="Constants removed: one scale"
)
ax.legend(frameon=False, fontsize=8)
figure.savefig(FIGURES / "one-scale-losses.png", dpi=120)

# %% [markdown]
# ![Losses with and without their constants](images/one-scale-losses.png)

# %% [markdown]
# ## Few data
#
# A small network as the energy, data from three Gaussians in the plane, and the loss that matters: the explicit one
# against the true score, on fresh data. With few data implicit score matching drives the curvature at the data points
# down without limit: the network overfits. Denoising blurs each point by $\sigma$: too little is no better, too
# much is biased. There is a best noise, and it shrinks with the number of data.

# %%
CENTRES = torch.tensor([[0.0, 2.0], [-1.8, -1.0], [1.8, -1.0]])


def three_gaussians(num_rows):
    return CENTRES[torch.randint(3, (num_rows,))] + 0.7 * torch.randn(num_rows, 2)


def true_score(x):
    share = torch.softmax(-((x[:, None] - CENTRES) ** 2).sum(-1) / (2 * 0.7**2), 1)
    return (share @ CENTRES - x) / 0.7**2


def fit(loss, data, steps=400):
    """The explicit loss of a network energy on fresh data, after training on `data`."""
    pyro.clear_param_store()
    net = nn.Sequential(nn.Linear(2, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))

    def energy():
        pyro.module("net", net)
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("f", net(x)[..., 0] - 0.05 * x.square().sum(-1))

    svi = SVI(energy, no_guide, Adam({"lr": 1e-2}), loss)
    for _ in range(steps):
        svi.step(data[torch.randint(len(data), (256,))])
    fresh = three_gaussians(4000).requires_grad_(True)
    (slope,) = torch.autograd.grad((net(fresh)[:, 0] - 0.05 * fresh.square().sum(1)).sum(), fresh)
    return float(explicit(slope, true_score(fresh)).mean().detach())


noise_scales = (0.05, 0.1, 0.2, 0.4, 0.8)
figure = Figure(figsize=(6, 3.6), layout="constrained")
ax = figure.subplots()
for num_rows, colour in ((100, ORANGE), (2000, BLUE)):
    table = []
    for seed in range(2):
        pyro.set_rng_seed(seed)
        data = three_gaussians(num_rows)
        table.append(
            [fit(loss, data) for loss in (ImplicitScoreMatching(), *map(DenoisingScoreMatching, noise_scales))]
        )
    implicit_loss, *denoising_losses = torch.tensor(table).median(0).values.tolist()
    best = min(range(len(noise_scales)), key=lambda i: denoising_losses[i])
    print(
        f"{num_rows} rows: implicit {implicit_loss:.3f}; denoising "
        + ", ".join(f"{s}: {value:.3f}" for s, value in zip(noise_scales, denoising_losses, strict=True))
    )
    ax.loglog(noise_scales, denoising_losses, "o-", color=colour, label=f"denoising, {num_rows} rows")
    ax.axhline(implicit_loss, color=colour, ls="--", label=f"implicit, {num_rows} rows")
ax.set(
    xlabel="noise scale $\\sigma$", ylabel="explicit loss on fresh data", title="Generalisation of a network energy"
)
ax.set_xticks(noise_scales, labels=noise_scales)
ax.set_xticks([], minor=True)
ax.legend(frameon=False, fontsize=8)
figure.savefig(FIGURES / "one-scale-few-data.png", dpi=120)

# %% [markdown]
# ![Held-out losses of fits to few data](images/one-scale-few-data.png)

# %% [markdown]
# What to take away. Compare losses only with their constants removed. Use implicit score matching where second
# derivatives are affordable and data are plenty; denoising, with the control variate, where data are few or second
# derivatives are not there; and choose $\sigma$ on held-out data *by the implicit loss*, which does not move with
# $\sigma$.
#
# Sources: Hyvärinen, "Estimation of Non-Normalized Statistical Models by Score Matching"
# (https://jmlr.org/papers/v6/hyvarinen05a.html); Vincent, "A Connection Between Score Matching and Denoising
# Autoencoders" (https://doi.org/10.1162/NECO_a_00142); Artemev et al. 2024, which compares the two.
