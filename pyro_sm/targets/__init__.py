# SPDX-License-Identifier: Apache-2.0
"""Problems with known answers, in plain torch."""
