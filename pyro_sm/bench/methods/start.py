# SPDX-License-Identifier: Apache-2.0
r"""Where every method on a target begins: the target's covering Gaussian ``N(m, diag(s)²)``.

As the base of a diffusion, as the first particles, as starts of chains, or, for Pyro's own guides, as the standard
normal of ``u = (x − m)/s``. Particles get, for every method alike, the network that has their symmetry, and more
kernels; large clusters less of everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import pyro
import pyro.distributions as dist
import torch

from pyro_sm.bench.methods.baselines import BoundedOutput
from pyro_sm.bench.problem import Particles
from pyro_sm.examples.improper import factor_model
from pyro_sm.guides import AutoDiffusion, GivenBase
from pyro_sm.nn.egnn import EGNN
from pyro_sm.targets import LennardJones, Target

# The base has one variance for all directions, which bonded particles have not: short steps make up for it. A kernel
# is a pass of the network; droplets, whose passes are dearest, get fewer.
_PARTICLE_KERNELS, _DROPLET_KERNELS = 96, 64
_LARGE = 20
"""Particles above which a cluster is large: of 55 a message passes between 1485 pairs, of 13 between 78."""
LEAPFROG = 10
"""Leapfrog steps of a move where one, a random walk, is too slow: in a large cluster, and of final draws."""


def model(target: Target) -> Callable[[], None]:
    """The target as a model with one latent, ``x``."""
    return factor_model(target.log_prob, target.dim)


def whitened_model(target: Target) -> Callable[[], None]:
    """The target as a model of ``u = (x − m)/s``, with the log determinant: its evidence is the target's.

    Pyro's flow guides begin with a draw of the prior, which an improper one has not: ``N(0, I)`` is put in and taken
    out again.
    """
    loc, scale = target.start
    log_det = float(scale.log().sum())
    normal = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)

    def whitened() -> None:
        u = pyro.sample("x", normal)
        pyro.factor("log_prob", target.log_prob(loc + scale * u) + log_det - normal.log_prob(u))

    return whitened


def are_particles(target: Target) -> TypeGuard[Particles]:
    """Whether it is a system of particles."""
    return isinstance(target, Particles)


def are_many_particles(target: Target) -> bool:
    """Whether it is a large cluster of them: with the same sizes as elsewhere one round would take an hour."""
    return are_particles(target) and target.particles.num_bodies > _LARGE


def guide_at(
    target: Target, of_target: Callable[[], None], *, bounded: bool = False, compile: bool = False
) -> AutoDiffusion:
    """The start as its base and everything else at its default.

    Args:
        target: the target.
        of_target: its :func:`model`.
        bounded: bound the network's output on particles, for objectives that are unstable without.
        compile: whether to compile the network.
    """
    base = GivenBase(*target.start)
    if not are_particles(target):
        return AutoDiffusion(of_target, base=base, compile=compile)
    network = EGNN(target.particles.num_bodies, target.particles.space_dim)
    num_steps = _DROPLET_KERNELS if isinstance(target, LennardJones) else _PARTICLE_KERNELS
    architecture = BoundedOutput(network) if bounded else network
    return AutoDiffusion(of_target, base=base, architecture=architecture, num_steps=num_steps, compile=compile)
