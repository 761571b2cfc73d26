# SPDX-License-Identifier: Apache-2.0
"""Simulation-based calibration: are posteriors right on average over data sets that the model itself simulates?"""
