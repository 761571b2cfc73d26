# SPDX-License-Identifier: Apache-2.0
"""The diffusion sampler without Pyro: network and noise levels, kernels, flow, coordinates, in plain torch."""
