# SPDX-License-Identifier: Apache-2.0
"""The command line: ``demo``, ``sample FILE.py:MODEL``, ``bench``."""
