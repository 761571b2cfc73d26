# SPDX-License-Identifier: Apache-2.0
"""What an objective does with a guide between rounds: fit the sampler to draws, let the guide take it over."""

import torch


def noncentre(guide, z, *, begin=True):
    """Straighten a funnel that latents ``z`` (N, D) show; whether anything was changed."""
    with torch.no_grad():
        process = guide.diffusion().noncentred(z, begin=begin)
        if process is not None:
            guide.adapt(process)
    return process is not None


def move(guide, z, group=None):
    """Move an untrained guide to latents ``z`` (N, D); whether that was done."""
    with torch.no_grad():
        process = guide.diffusion()
        if process.is_trained(z):
            return False
        guide.adapt(process.moved_to(z, group))
    return True


def refit(guide, z):
    """Refit levels, variances and start to latents ``z`` (N, D)."""
    with torch.no_grad():
        guide.adapt(guide.diffusion().refitted(z))
