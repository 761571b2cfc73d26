# SPDX-License-Identifier: Apache-2.0
"""The training of one guide and of several: steps, schedule, state, checkpoints, processes, progress."""
