# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: commands that print the tables."""
