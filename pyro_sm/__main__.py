# SPDX-License-Identifier: Apache-2.0
"""``python -m pyro_sm``: see :mod:`pyro_sm.cli`."""

from __future__ import annotations

import sys

from pyro_sm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
