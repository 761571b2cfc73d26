# SPDX-License-Identifier: Apache-2.0
r"""Reference draws of targets that have no exact ones, shipped with the package.

They come from long parallel tempering, as ``python -m pyro_sm bench references`` runs it; the ``.json`` beside each
file says with which settings, and what was measured.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor


def load_draws(name: str, dtype: torch.dtype) -> Tensor:
    """Latents (N, D), stored as float32.

    Raises:
        ValueError: there are none of this name.
    """
    file = resources.files("pyro_sm.targets").joinpath(f"data/{name}.npz")
    if not file.is_file():
        raise ValueError(f"there are no reference draws of '{name}': make them with `bench references`")
    with file.open("rb") as stream, np.load(stream) as content:
        return torch.from_numpy(content["latents"]).to(dtype)


def load_provenance(name: str) -> dict[str, Any]:
    """How the draws of this name were made, and what was measured.

    Raises:
        ValueError: there are none of this name.
    """
    file = resources.files("pyro_sm.targets").joinpath(f"data/{name}.json")
    if not file.is_file():
        raise ValueError(f"there are no reference draws of '{name}': make them with `bench references`")
    return json.loads(file.read_text())
