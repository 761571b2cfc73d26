# SPDX-License-Identifier: Apache-2.0
"""The version, in a file of its own: exports record it, and packaging reads it without importing torch."""

__version__ = "0.1.0.dev0"
