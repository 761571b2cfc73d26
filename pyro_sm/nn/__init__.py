# SPDX-License-Identifier: Apache-2.0
"""Networks ``(x, noise level, context) -> (B, O)``, in plain torch."""
