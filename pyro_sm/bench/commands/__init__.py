# SPDX-License-Identifier: Apache-2.0
"""One file a command of ``python -m pyro_sm bench``: what it measures, its options, and its tables."""
