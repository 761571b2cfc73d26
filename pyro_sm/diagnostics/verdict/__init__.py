# SPDX-License-Identifier: Apache-2.0
"""Can the result be trusted? Findings about weights, training, chains and the probe; the lines drawn; the verdict."""
