# SPDX-License-Identifier: Apache-2.0
"""Normal laws: their density, their fits by curvature (Laplace) and by scores (Batch-and-Match)."""
