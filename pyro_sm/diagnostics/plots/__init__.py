# SPDX-License-Identifier: Apache-2.0
"""Figures, with matplotlib: of draws and training, of calibration, of benchmarks."""
