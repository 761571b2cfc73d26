# SPDX-License-Identifier: Apache-2.0
"""Importance-weighted score matching: the training of a diffusion guide on an unnormalised model."""
