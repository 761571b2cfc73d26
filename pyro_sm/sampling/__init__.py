# SPDX-License-Identifier: Apache-2.0
"""Reverse kernels with path weights, the probability flow, and defensive mixtures, in plain torch."""
