# SPDX-License-Identifier: Apache-2.0
"""Normal laws and mixtures of t laws: densities, and fits by curvature, by scores and by weighted EM."""
