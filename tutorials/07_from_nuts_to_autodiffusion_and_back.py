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
# # From NUTS to AutoDiffusion and back
#
# <!--
# SPDX-License-Identifier: Apache-2.0
# -->
#
# A whole analysis, with the tools that a user of NUTS and ArviZ has at hand already: prior, fit, verdict, posterior
# predictive check, leave-one-out cross-validation, and a choice between three models. NUTS and the diffusion sampler
# fit the same model side by side; in the end the draws of one give the other its start.
#
# The data: 46 mesquite bushes, each measured with a ruler and then harvested and weighed. How heavy is a bush, to
# judge by its sizes? About two minutes on one thread.

# %%
import os
import tempfile
import time
import warnings
from pathlib import Path

import matplotlib

warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
matplotlib.use("Agg")

import arviz as az
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS, Predictive

import pyro_sm
from pyro_sm.diagnostics import summary_table
from pyro_sm.examples.posteriors import posteriors

# What ArviZ 0.23 says of its own use of matplotlib and pandas.
warnings.filterwarnings("ignore", message="Passing a dict or None as alias_mapping")
warnings.filterwarnings("ignore", message="The (inplace|copy) keyword")

torch.set_num_threads(1)
FIGURES = Path(os.environ.get("PYRO_SM_FIGURES") or tempfile.mkdtemp())
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#888888"

# %% [markdown]
# ## The model
#
# A straight line in logarithms. The columns of the design are centred, so that `alpha` is the log weight (of grams)
# of an average bush. Every prior is proper: an improper one is no hindrance to NUTS, to the sampler or to
# cross-validation, but it leaves the evidence without a meaning.

# %%
columns, log_weight = (value.float() for value in posteriors()["mesquite-logmesquite"].args)
_, diam1, diam2, canopy_height, total_height, density, group = columns.T
volume = diam1 + diam2 + canopy_height  # logs: the sum is the log of a product
designs = {
    "volume": torch.stack([volume], 1),
    "volume and group": torch.stack([volume, group], 1),
    "all six": torch.stack([diam1, diam2, canopy_height, total_height, density, group], 1),
}
designs = {name: x - x.mean(0) for name, x in designs.items()}
names = {"volume": ["volume"], "volume and group": ["volume", "group"]}
names["all six"] = ["diam1", "diam2", "canopy_height", "total_height", "density", "group"]


def bushes(x, y=None, width=1.5):
    alpha = pyro.sample("alpha", dist.Normal(5.0, 2.5))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), width).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("bush", len(x)):
        pyro.sample("log_weight", dist.Normal(alpha + (x * beta).sum(-1), sigma), obs=y)


# %% [markdown]
# Before any fit, the data that the prior holds for likely. Nine in ten of its bushes weigh between a gram and a
# hundred kilograms: wide, but on the scale of plants.

# %%
pyro.set_rng_seed(0)
x = designs["all six"]
imagined = Predictive(bushes, num_samples=1000)(x)["log_weight"] - torch.log(torch.tensor(1000.0))
for kilograms in (0.001, 0.1, 100):
    share = float((imagined.exp() < kilograms).float().mean())
    print(f"share of bushes below {kilograms:g} kg, by the prior: {share:.2f}")

# %% [markdown]
# ## The fit you have: NUTS
#
# `az.from_pyro` can compute the pointwise log likelihood that cross-validation needs, but not of this model: it asks
# Pyro to run it on all draws at once, which fails for a vector of latents outside a plate. `ModelDensity` finds a
# way.

# %%
calls = 0
model_density = pyro_sm.ModelDensity(bushes, (x, log_weight))


def counted(*args):
    """The model; NUTS runs it once for each step of its integrator."""
    global calls
    calls += 1
    bushes(*args)


def run_nuts(kernel, warmup, initial=None):
    """A chain of 1000 draws, what it took, and its ArviZ data."""
    global calls
    pyro.set_rng_seed(1)
    calls, start = 0, time.perf_counter()
    chain = MCMC(kernel, num_samples=1000, warmup_steps=warmup, initial_params=initial, disable_progbar=True)
    chain.run(x, log_weight)
    seconds = time.perf_counter() - start
    taken = f"{calls} gradients, {seconds:.0f} s"
    pointwise = model_density.log_likelihood(model_density.pack(chain.get_samples()))
    coords = {"regressor": names["all six"], "bush": range(len(x))}
    idata = az.from_pyro(chain, log_likelihood=False, coords=coords, dims={"beta": ["regressor"]})
    idata.add_groups(
        log_likelihood={name: value[None].numpy() for name, value in pointwise.items()},
        coords=coords,
        dims={"log_weight": ["bush"]},
    )
    return idata, taken


nuts, cost = run_nuts(NUTS(counted), warmup=500)
print(f"NUTS: {cost}, smallest ess_bulk {float(az.ess(nuts).to_array().min()):.0f} of 1000")

# %% [markdown]
# ## The fit beside it
#
# The same model, the same data, and the two smaller models beside it. `check` says whether to trust a fit, having
# looked elsewhere for what it might have lost. The largest is trained twice, as replicas, which become ArviZ's
# chains: on narrow posteriors with correlated directions the look elsewhere may fail itself (the verdict says so),
# and then there are two fits that agree, or do not.

# %%
samplers = {}
for name, design in designs.items():
    samplers[name] = pyro_sm.DiffusionSampler(
        bushes,
        stopping=pyro_sm.StoppingRule(max_evaluations=20_000),
        num_chains=2 if name == "all six" else 1,
        disable_progbar=True,
    )
    samplers[name].run(design, log_weight)
    print(f"{name}: {samplers[name].check().level.words}")
print(samplers["all six"].report())
exports = {name: sampler.to_arviz() for name, sampler in samplers.items()}
ours = exports["all six"]

# %%
print(summary_table(ours))
print(az.summary(nuts, kind="stats"))

# %% [markdown]
# The export has the groups that ArviZ's functions ask for: `prior`, `prior_predictive`, `posterior`,
# `posterior_predictive`, `log_likelihood`, `observed_data`; its dimensions are named by the plates of the model.

# %%
figure = Figure(figsize=(10, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
az.plot_ppc(ours, group="prior", num_pp_samples=60, random_seed=0, ax=left, textsize=9)
az.plot_ppc(ours, group="posterior", num_pp_samples=60, random_seed=0, ax=right, textsize=9)
left.set(title="60 data sets from the prior", xlabel="log weight of a bush, log grams", xlim=(-8, 18))
right.set(title="60 data sets from the posterior", xlabel="log weight of a bush, log grams")
figure.savefig(FIGURES / "mesquite-predictive.png", dpi=110)

# %% [markdown]
# ![Data drawn from the prior and from the posterior](images/mesquite-predictive.png)

# %% [markdown]
# ## Leave one out
#
# How well would each bush be predicted from the others? `az.loo` needs the pointwise log likelihood and says by its
# own k̂ whether its shortcut is good: a warning means that one of the bushes counts for too much, for the number of
# draws there are. Of the same model the two fits must give the same answer.

# %%
print(az.loo(ours, pointwise=True))
print(az.compare({"DiffusionSampler": ours, "NUTS": nuts}).to_string())

# %% [markdown]
# ## Three models
#
# Cross-validation tells them apart by prediction; the standard error of a difference, `dse`, is that of 46 bushes.

# %%
by_loo = az.compare(exports)
print(by_loo.to_string())

# %% [markdown]
# The evidence tells them apart by what each had said beforehand: a model that spreads its prior over six slopes and
# needs two pays for the four. NUTS does not estimate it; of a trained sampler it is a by-product, with an error.

# %%
by_evidence = pyro_sm.compare_evidence(samplers)
print(by_evidence)

# %% [markdown]
# Which is to be believed? Neither by itself. The evidence is against the volume alone, and cross-validation leans
# that way: bushes of the two groups differ. Between the other two, cross-validation cannot decide, while the evidence
# can, but its answer is only as good as the prior. With slopes allowed twice as wide, and nothing else changed:

# %%
wide = {}
for name in ("volume and group", "all six"):
    wide[name] = pyro_sm.DiffusionSampler(
        bushes, stopping=pyro_sm.StoppingRule(max_evaluations=20_000), disable_progbar=True
    )
    wide[name].run(designs[name], log_weight, width=3.0)
for width, found in (("1.5", by_evidence), ("3.0", pyro_sm.compare_evidence(wide))):
    factor = found.log_bayes_factor("volume and group", "all six")
    print(
        f"prior width {width}: log Bayes factor of two regressors over six {factor.value:.3f} ± {factor.se:.3f} nats"
    )
by_loo_wide = az.compare({name: sampler.to_arviz() for name, sampler in wide.items()})
print(by_loo_wide[["elpd_loo", "elpd_diff", "dse"]].to_string())

# %%
order = list(designs)
figure = Figure(figsize=(10, 3.4), layout="constrained")
coefficients, loo_axis, evidence_axis = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
rows = torch.arange(6)
for idata, shift, colour, label in ((ours, -0.13, BLUE, "DiffusionSampler"), (nuts, 0.13, ORANGE, "NUTS")):
    draws = torch.as_tensor(idata.posterior["beta"].values).flatten(0, 1)
    low, middle, high = torch.quantile(draws.double(), torch.tensor([0.03, 0.5, 0.97]).double(), dim=0)
    coefficients.hlines(rows + shift, low, high, color=colour, lw=1.6)
    coefficients.plot(middle, rows + shift, "o", ms=4.5, color=colour, label=label)
coefficients.axvline(0, color=GREY, lw=0.8, ls=":")
coefficients.set(title="slopes of all six, median and 94 %", yticks=rows.tolist(), yticklabels=names["all six"])
coefficients.set_ylim(5.6, -1.5)
coefficients.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
difference = -by_loo.loc[order, "elpd_diff"]
loo_axis.errorbar(difference, range(3), xerr=by_loo.loc[order, "dse"], fmt="o", color=BLUE, capsize=3)
loo_axis.set(
    title="cross-validation, ± dse", xlabel="elpd minus the best's, nats", yticks=range(3), yticklabels=order
)
table = by_evidence.to_dataframe().loc[order]
evidence_axis.errorbar(-table["log_bayes_factor"], range(3), xerr=table["dse"], fmt="o", color=BLUE, capsize=3)
evidence_axis.set(title="log evidence, ± dse", xlabel="minus the best's, nats", yticks=range(3), yticklabels=[])
for ax in (loo_axis, evidence_axis):
    ax.axvline(0, color=GREY, lw=0.8, ls=":")
    ax.set_ylim(2.5, -0.5)
figure.savefig(FIGURES / "mesquite-comparison.png", dpi=110)

# %% [markdown]
# ![Slopes of two fits; three models by cross-validation and by evidence](images/mesquite-comparison.png)

# %% [markdown]
# ## And back
#
# A trained sampler knows where the posterior is and how its directions hang together, which is what the warm-up of
# NUTS has to find out. `initial_params` of `MCMC` takes a draw, and the kernel a mass matrix, both in unconstrained
# space, where `ModelDensity.pack` takes draws.


# %%
class WarmNUTS(NUTS):
    """NUTS with a mass matrix that is known beforehand, of all sites together, in the order of their names."""

    def __init__(self, model, covariance):
        super().__init__(model, adapt_mass_matrix=False, full_mass=True)
        self.covariance = covariance

    def setup(self, warmup_steps, *args, **kwargs):
        super().setup(warmup_steps, *args, **kwargs)
        (block,) = self.mass_matrix_adapter.inverse_mass_matrix
        self.mass_matrix_adapter.inverse_mass_matrix = {block: self.covariance}


sites = sorted(model_density.sites, key=lambda site: site.name)
z = model_density.pack(samplers["all six"].get_samples(4000))
z = {site.name: z[:, site.start : site.stop] for site in sites}
start = {site.name: z[site.name][0].reshape(site.unconstrained_shape) for site in sites}
covariance = torch.cov(torch.cat(list(z.values()), 1).T)

warm, cost_warm = run_nuts(WarmNUTS(counted, covariance), warmup=100, initial=start)
for label, idata, spent in (("cold", nuts, cost), ("warm", warm, cost_warm)):
    print(f"NUTS, {label}: {spent}, smallest ess_bulk {float(az.ess(idata).to_array().min()):.0f} of 1000")

# %% [markdown]
# The chain that comes out is exact in the limit, whatever our draws were: the start and the mass matrix change what
# it costs, not where it goes. It is a second opinion as well, on posteriors of one mode. On several, a chain stays in
# the mode that it was started in.
#
# <!-- Place for NUTS in the latent space of a trained guide (NeuTra, by the probability flow), once it is there. -->
#
# ## Which one, then
#
# On this posterior, NUTS: it has one mode and eight dimensions, NUTS draws from it exactly in the limit, for fewer
# evaluations than training takes, and without a network. What the sampler adds is the evidence, a verdict that has
# looked elsewhere, and as many more draws as are wanted for a network pass each. Where NUTS would stay in one of
# several modes the roles are the other way round: see tutorials 1 and 6.
#
# Sources: "Data Analysis Using Regression and Multilevel/Hierarchical Models"
# (https://doi.org/10.1017/CBO9780511790942) for the bushes; "Practical Bayesian model evaluation using leave-one-out
# cross-validation and WAIC" (https://arxiv.org/abs/1507.04544); "Bayes Factors"
# (https://doi.org/10.1080/01621459.1995.10476572).
