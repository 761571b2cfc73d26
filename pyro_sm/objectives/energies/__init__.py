# SPDX-License-Identifier: Apache-2.0
"""Score matching for unnormalised models with parameters: implicit, denoising, diffusion, and along a bridge."""
