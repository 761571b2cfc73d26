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
# # Diffusion matrices are flows
#
# <!--
# SPDX-License-Identifier: Apache-2.0
# -->
#
# Score matching can be weighted by a matrix $m(x)$: $J_m = E\|m^\top(s_q - s_p)\|^2$. Which matrix? The theorem of
# this notebook: for a flow $y=T(x)$ with Jacobian $J$, plain score matching in $y$ *is* score matching in $x$ with
# $m = J^{-1}$. So choosing a matrix is choosing the space in which slopes are compared; for data with
# heavy tails, a space in which they have none.
#
# First the theorem on screen, for a flow in one step and for one along an ODE; then what it is good for.
# About a minute on two cores.

# %%
import itertools
import os
import tempfile
from pathlib import Path

import matplotlib
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI
from pyro.optim import PyroLRScheduler
from torch.distributions import constraints
from torch.distributions.transforms import Transform

matplotlib.use("Agg")

from pyro_sm.objectives import (
    AsinhFlow,
    ContinuousFlow,
    DiffusionScoreMatching,
    FlowMetric,
    ImplicitScoreMatching,
    fit_flow,
    no_guide,
)
from pyro_sm.objectives.diffusion_matrices import along_flow

torch.set_num_threads(1)
FIGURES = Path(os.environ.get("PYRO_SM_FIGURES") or tempfile.mkdtemp())
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
F64 = torch.float64

# %% [markdown]
# ## The theorem on screen
#
# Two Gaussians $q$ and $p$ in the plane, and a flow that bends the plane: $T(x) = (x_1,\; x_2 e^{x_1/2} + x_1^2)$.
# Every point gives one number in $y$ (both densities pushed through $T$, then ordinary scores) and one in $x$ (the
# difference of scores, multiplied by $J^{-\top}$). They agree to rounding. With the transpose forgotten they do not.


# %%
class Bend(Transform):
    """``(x1, x2 exp(x1/2) + x1²)``."""

    domain = codomain = constraints.real_vector
    bijective = True

    def _call(self, x):
        return torch.stack([x[..., 0], x[..., 1] * torch.exp(x[..., 0] / 2) + x[..., 0] ** 2], -1)

    def _inverse(self, y):
        return torch.stack([y[..., 0], (y[..., 1] - y[..., 0] ** 2) * torch.exp(-y[..., 0] / 2)], -1)

    def log_abs_det_jacobian(self, x, y):
        return x[..., 0] / 2


q = dist.MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
p = dist.MultivariateNormal(torch.tensor([0.4, -0.3], dtype=F64), torch.tensor([[1.5, 0.6], [0.6, 0.8]], dtype=F64))
flow = Bend()
torch.manual_seed(0)
x = q.sample((2000,))


def score(log_prob, at):
    leaf = at.detach().requires_grad_(True)
    return torch.autograd.grad(log_prob(leaf).sum(), leaf)[0]


def pushed(law):
    """The log density of `T(x)` for `x` of this law, as a function of y."""
    return lambda y: law.log_prob(flow.inv(y)) - flow.log_abs_det_jacobian(flow.inv(y), y)


y = flow(x)
in_y = (score(pushed(q), y) - score(pushed(p), y)).square().sum(1)
difference = score(q.log_prob, x) - score(p.log_prob, x)
in_x = FlowMetric(flow)(x, difference).detach().square().sum(1)
jacobian = torch.func.vmap(torch.func.jacrev(flow))(x)
transposed = torch.linalg.solve(jacobian, difference[..., None])[..., 0].square().sum(1)
print(f"Fisher divergence in y {float(in_y.mean()):.6f}")
print(
    f"with m = inverse Jacobian in x {float(in_x.mean()):.6f}, "
    f"largest difference {float((in_y - in_x).abs().max()):.1e}"
)
print(f"with the wrong transpose {float(transposed.mean()):.6f}")

# %%
figure = Figure(figsize=(10, 3.4), layout="constrained")
left, middle, right = figure.subplots(1, 3)
lines = torch.linspace(-2.5, 2.5, 11, dtype=F64)
along = torch.linspace(-2.5, 2.5, 80, dtype=F64)
for value in lines:
    for line in (torch.stack([along, value.expand(80)], 1), torch.stack([value.expand(80), along], 1)):
        bent = flow(line)
        left.plot(bent[:, 0], bent[:, 1], color=GREY, lw=0.6)
left.plot(*y[:500].T, ".", ms=2, color=BLUE)
left.set(title="the plane after $T$", xlabel="$y_1$", ylabel="$y_2$", ylim=(-6, 10))
for ax, values, title in ((middle, in_x, "$m=J^{-1}$"), (right, transposed, "transpose forgotten")):
    ax.loglog(in_y, values, ".", ms=3, color=GREEN if ax is middle else ORANGE)
    ax.plot([1e-3, 1e2], [1e-3, 1e2], color="black", lw=0.8)
    ax.set(
        xlim=(1e-3, 1e2),
        ylim=(1e-3, 1e2),
        title=title,
        xlabel="$\\|\\Delta\\|^2$ in $y$",
        ylabel="$\\|m^\\top\\Delta\\|^2$ in $x$",
    )
figure.savefig(FIGURES / "flows-theorem.png", dpi=110)

# %% [markdown]
# ![Score matching under a matrix, and in the space of the flow](images/flows-theorem.png)

# %% [markdown]
# ## Along an ODE
#
# A flow may also be the solution of $\dot x = g(x, t)$. Then the difference of scores $\delta$ obeys
# $\dot\delta=-A^\top\delta$ with $A=\partial g/\partial x$, and the divergence changes at the rate
# $-2E[\delta^\top A\delta]$. Both sides, integrated over a whirl that gets slower outwards; and the same number from
# `ContinuousFlow` in the place of `T` above.


# %%
def whirl(x, t):
    radius = x.square().sum(-1, keepdim=True)
    return torch.cat([-x[..., 1:], x[..., :1]], -1) / (1 + radius) - 0.3 * x * torch.cos(torch.as_tensor(t))


times = torch.linspace(0, 2, 41, dtype=F64)
divergence, predicted = [float(difference.square().sum(1).mean())], [float(difference.square().sum(1).mean())]
state_x, state_delta = x, difference
for start, stop in itertools.pairwise(times):
    step = along_flow(whirl, state_x, state_delta, torch.stack([start, stop]))
    state_x, state_delta = step.x, step.delta
    divergence.append(float(state_delta.square().sum(1).mean()))
    predicted.append(predicted[-1] + float(step.change.mean()))
one_step = FlowMetric(ContinuousFlow(whirl, times))(x, difference).detach().square().sum(1).mean()
print(
    f"at t = 2: carried along {divergence[-1]:.6f}, integrated rate {predicted[-1]:.6f}, "
    f"as a matrix {float(one_step):.6f}"
)

figure = Figure(figsize=(5.5, 3.2), layout="constrained")
ax = figure.subplots()
ax.plot(times, divergence, color=BLUE, lw=4, alpha=0.4, label="$E\\|\\delta_t\\|^2$, carried along")
ax.plot(times, predicted, color=ORANGE, ls="--", label="integral of $-2E[\\delta^\\top A\\delta]$")
ax.set(xlabel="t", ylabel="Fisher divergence", title="Along an ODE")
ax.legend(frameon=False)
figure.savefig(FIGURES / "flows-ode.png", dpi=110)

# %% [markdown]
# ![The Fisher divergence along a flow, carried by an ODE](images/flows-ode.png)

# %% [markdown]
# ## What it is good for: heavy tails
#
# Fifty Student-t data with two degrees of freedom, of infinite variance; the model has a location and a scale.
# Plain score matching weights points by squared slopes, and in the tails slopes go to zero: the tails, which know the
# scale, say nothing. A flow learned from the data (by maximum likelihood, before score matching; never by score
# matching itself, which would shrink it to nothing) maps them to something like a Gaussian, and score matching
# *there* uses the tails. Errors over repeated data sets, against maximum likelihood in the full, normalised model.

# %%
NU, ROWS, REPEATS = 2.0, 50, 16


def heavy():
    loc = pyro.param("loc", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(1.5), constraint=constraints.positive)
    x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (1,)))
    pyro.factor("f", dist.StudentT(NU, loc, scale).log_prob(x).sum(-1))


def fitted(loss, data, steps=150):
    pyro.clear_param_store()
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "T_max": steps}
    optimiser = PyroLRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, schedule)
    svi = SVI(heavy, no_guide, optimiser, loss)
    for _ in range(steps):
        svi.step(data)
        optimiser.step()
    return [float(pyro.param("loc").detach()), float(pyro.param("scale").log().detach())]


def most_likely(data):
    loc, log_scale = torch.tensor(0.5, requires_grad=True), torch.tensor(0.4, requires_grad=True)
    optimiser = torch.optim.LBFGS([loc, log_scale], line_search_fn="strong_wolfe", max_iter=50)

    def closure():
        optimiser.zero_grad()
        value = -dist.StudentT(NU, loc, log_scale.exp()).log_prob(data).mean()
        value.backward()
        return value

    optimiser.step(closure)
    return [float(loc.detach()), float(log_scale.detach())]


ways = ("plain score matching", "with a learned flow", "maximum likelihood")
estimates = {name: [] for name in ways}
for seed in range(REPEATS):
    pyro.set_rng_seed(seed)
    data = dist.StudentT(NU, 0.0, 1.0).sample((ROWS, 1))
    learned = AsinhFlow(1)
    fit_flow(learned, data, num_steps=200)
    estimates["plain score matching"].append(fitted(ImplicitScoreMatching(), data))
    estimates["with a learned flow"].append(fitted(DiffusionScoreMatching(learned), data))
    estimates["maximum likelihood"].append(most_likely(data))
root = {name: torch.tensor(values).square().mean(0).sqrt().tolist() for name, values in estimates.items()}
for name, (loc, scale) in root.items():
    print(f"{name:22s} root mean square error: location {loc:.3f}, log scale {scale:.3f}")

# %%
figure = Figure(figsize=(9, 3.4), layout="constrained")
left, right = figure.subplots(1, 2)
grid = torch.linspace(-12, 12, 400)[:, None]
slope = score(lambda at: dist.StudentT(NU, 0.0, 1.0).log_prob(at).sum(-1), grid)
with torch.no_grad():
    mapped = learned(grid)
left.plot(grid, slope, color=GREY, label="slope of log p in x")
left.plot(grid, mapped, color=GREEN, label="the learned flow, $y=T(x)$")
left.plot(data, torch.full_like(data, -4.0), "|", color=BLUE, ms=8, label="data")
left.set(xlabel="x", xlim=(-12, 12), ylim=(-4.5, 4.5), title="Where slopes vanish, the flow goes on")
left.legend(frameon=False, fontsize=8, loc="upper left")
for position, (name, colour) in enumerate(zip(ways, (ORANGE, GREEN, GREY), strict=True)):
    log_scale = torch.tensor(estimates[name])[:, 1]
    right.plot(torch.full_like(log_scale, position), log_scale, "o", color=colour, alpha=0.6)
right.axhline(0, color="black", lw=0.8)
right.set(xticks=range(3), xticklabels=[name.replace(" ", "\n", 1) for name in ways], ylabel="log scale (true 0)")
right.set_title(f"{REPEATS} data sets of {ROWS}")
figure.savefig(FIGURES / "flows-heavy-tails.png", dpi=110)

# %% [markdown]
# ![A learned flow on heavy tails, and the errors of the scale](images/flows-heavy-tails.png)

# %% [markdown]
# The same flows serve guides (`FisherDivergence(metric=FlowMetric(flow))`) and the kernel Stein discrepancy
# (`SteinDiscrepancy(flow=flow)`); a Riemannian metric $G$ is `RiemannianMetric(G)`, with $m m^\top=G^{-1}$.
#
# Source: Gong & Li, "Interpreting diffusion score matching using normalizing flow" (https://arxiv.org/abs/2107.10072);
# the estimator with a matrix: Barp et al., "Minimum Stein Discrepancy Estimators" (https://arxiv.org/abs/1906.08283).
