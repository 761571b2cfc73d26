# SPDX-License-Identifier: Apache-2.0
"""Fifteen real and synthetic posteriors with reference answers, as ordinary Pyro models: :func:`posteriors`."""

from pyro_sm.examples.posteriors.catalogue import posteriors
from pyro_sm.examples.posteriors.posterior import Moments, Posterior

__all__ = ["Moments", "Posterior", "posteriors"]
