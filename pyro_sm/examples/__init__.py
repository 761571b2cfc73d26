# SPDX-License-Identifier: Apache-2.0
"""Real posteriors with known answers, as ordinary Pyro models with their data: the demo, tutorials and tests."""
