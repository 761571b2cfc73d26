# SPDX-License-Identifier: Apache-2.0
"""Where modes are looked for: starts, ascents, Newton, distinct modes, and how complete the search was."""
