# SPDX-License-Identifier: Apache-2.0
"""A Pyro model on its data as a batched log density; the layer where Pyro enters."""

from pyro_sm.model.density import ModelDensity

__all__ = ["ModelDensity"]
