# SPDX-License-Identifier: Apache-2.0
"""Divergences between a guide and a model that need no evidence: Fisher, mixture Fisher, Stein."""
