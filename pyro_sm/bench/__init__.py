# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: commands whose rows are kept, and the tables that are made of them."""
