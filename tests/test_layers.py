# SPDX-License-Identifier: Apache-2.0
"""Imports go down only, own what they may own, and change nothing; every public name is explained."""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_sm

ROOT = Path(pyro_sm.__file__).parent
LAYERS = {
    "base": 0, "_version": 0,
    "weights": 1, "divergence": 1, "stein": 1, "density": 1, "nn": 1,
    "gaussians": 2, "search": 2, "diffusion": 2, "smc": 2, "corrections": 2, "targets": 2,
    "model": 3, "examples": 3,
    "objectives": 4, "guides": 4, "diagnostics": 4,
    "training": 5, "ladder": 5,
    "sampler": 6, "refine": 6,
    "bench": 7, "cli": 7, "__main__": 7, "": 7,
}  # fmt: skip
PLAIN_TORCH = 2  # the highest layer that must work without Pyro
ONLY_IN_DIAGNOSTICS = {"arviz", "arviz_base", "arviz_stats", "arviz_plots", "xarray", "matplotlib"}


def module_name(path):
    parts = ("pyro_sm", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def part(module):
    """The first component below the package."""
    return [*module.split("."), ""][1]


def layer(module):
    assert part(module) in LAYERS, f"{module} has no layer yet: give it one in this test"
    return LAYERS[part(module)]


def imports(source):
    """``(module, inside a function)`` for every import, also those in functions and under TYPE_CHECKING."""
    tree = ast.parse(source)
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            names = {f"{'.' * node.level}{node.module or ''}"}
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(SOURCES)
            if len(submodules) == len(node.names):
                names = submodules
            for name in names:
                yield name, id(node) in inside


def violations(module, source):
    """What ``module`` imports and must not, in words."""
    found = []
    for imported, in_function in imports(source):
        top = imported.split(".")[0]
        if imported.startswith("."):
            found.append(f"{module}: relative import {imported}")
        elif top == "pyro_sm":
            if in_function:
                found.append(f"{module}: {imported} inside a function")
            if layer(imported) > layer(module):
                found.append(f"{module} (L{layer(module)}) imports {imported} (L{layer(imported)})")
            if layer(module) == layer(imported) == 4 and part(module) != part(imported):
                found.append(f"{module} imports its sibling {imported}")
        elif top == "pyro" and layer(module) <= PLAIN_TORCH:
            found.append(f"{module} (L{layer(module)}) imports {imported}")
        elif (top in ONLY_IN_DIAGNOSTICS and part(module) != "diagnostics") or (
            imported.startswith("torch.distributed") and "distributions" not in imported
        ):
            found.append(f"{module} imports {imported}")
    return found


# -------------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down(module):
    assert violations(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyro_sm.nn.mlp", "from pyro_sm.diffusion.denoiser import Denoiser"),
        ("pyro_sm.diffusion.kernels", "import pyro"),
        ("pyro_sm.diffusion.kernels", "from pyro.distributions import Normal"),
        ("pyro_sm.guides.bases", "from pyro_sm.objectives.importance_weighted import buffer"),
        ("pyro_sm.objectives.importance_weighted.buffer", "import pyro_sm.guides.bases"),
        ("pyro_sm.diagnostics.plots.draws", "from pyro_sm.guides import AutoDiffusion"),
        ("pyro_sm.sampler", "def f():\n    import arviz as az"),
        ("pyro_sm.bench.batching", "from matplotlib import pyplot"),
        ("pyro_sm.model.density", "def f():\n    from pyro_sm.density import value_and_score"),
        ("pyro_sm.guides.posterior", "if TYPE_CHECKING:\n    from pyro_sm import sampler"),
        ("pyro_sm.model.density", "from .density import value_and_score"),
        ("pyro_sm.weights", "import torch.distributed as dist"),
        ("pyro_sm.diagnostics.plots.draws", "import pyro_sm"),
    ],
)
def test_the_check_itself_sees_a_violation(module, source):
    assert len(violations(module, source)) == 1


def test_there_is_no_import_ring():
    graph = {
        module: {name for name, _ in imports(source) if name in SOURCES and name != "pyro_sm"} - {module}
        for module, source in SOURCES.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())
    graph["pyro_sm.base"] = {"pyro_sm.diffusion.denoiser"}
    graph["pyro_sm.diffusion.denoiser"] = {"pyro_sm.base"}
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(graph).static_order())


# --------------------------------------------------------------------------------------- side effects

SNAPSHOT = """
import json, sys, warnings
import pyro, torch, torchdiffeq, tqdm, numpy

torch.manual_seed(5)
numpy.random.seed(5)

def state():
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "validation": [pyro.poutine.util.is_validation_enabled(), torch.distributions.Distribution._validate_args],
        "params": len(pyro.get_param_store()),
        "stack": len(pyro.poutine.runtime._PYRO_STACK),
        "torch rng": torch.get_rng_state().sum().item(),
        "numpy rng": [int(numpy.random.get_state()[1].sum()), numpy.random.get_state()[2]],
        "filters": [repr(f) for f in warnings.filters],
        "detect anomaly": torch.is_anomaly_enabled(),
        "hooks": [repr(sys.excepthook), repr(warnings.showwarning)],
    }

before = state()
CHANGE
import pyro_sm
print(json.dumps({"before": before, "after": state(), "modules": list(sys.modules), "name": pyro_sm.__name__}))
"""


def snapshot(change=""):
    code = SNAPSHOT.replace("CHANGE", change)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def imported():
    return snapshot()


def test_importing_changes_no_global_state(imported):
    assert imported["after"] == imported["before"]


def test_the_snapshot_sees_a_change():
    found = snapshot("torch.set_grad_enabled(False); torch.rand(1); warnings.simplefilter('ignore')")
    changed = {key for key in found["before"] if found["before"][key] != found["after"][key]}
    assert changed == {"grad", "torch rng", "filters"}


@pytest.mark.parametrize("heavy", ["matplotlib", "arviz", "arviz_base", "xarray", "torch.utils.tensorboard"])
def test_importing_does_not_import(imported, heavy):
    assert "pyro_sm.sampler" in imported["modules"]
    assert heavy not in imported["modules"]


def test_the_lower_layers_do_not_need_pyro():
    """Behind a stub of the package itself, whose ``__init__`` does import Pyro."""
    lower = [m for m in SOURCES if m != "pyro_sm" and layer(m) <= PLAIN_TORCH]
    assert len(lower) > 10
    code = (
        "import sys, types, importlib\n"
        "sys.modules['pyro'] = None\n"
        "stub = types.ModuleType('pyro_sm')\n"
        f"stub.__path__ = [{str(ROOT)!r}]\n"
        "sys.modules['pyro_sm'] = stub\n"
        f"[importlib.import_module(m) for m in {lower!r}]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ------------------------------------------------------------------------------------------ paperwork


def test_public_names_exist_and_are_explained():
    assert sorted(pyro_sm.__all__) == pyro_sm.__all__
    for name in pyro_sm.__all__:
        thing = getattr(pyro_sm, name)
        own = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
        assert own, name
        assert not own.startswith(f"{name}("), f"{name} has only the docstring that a dataclass makes up"


def test_public_methods_are_explained():
    for name in pyro_sm.__all__:
        thing = getattr(pyro_sm, name)
        if isinstance(thing, type):
            for attribute, value in vars(thing).items():
                if callable(value) and not attribute.startswith("_"):
                    assert value.__doc__, f"{name}.{attribute}"


def test_every_module_is_explained():
    for module, source in SOURCES.items():
        assert ast.get_docstring(ast.parse(source)), module


@pytest.mark.parametrize("folder", ["pyro_sm", "tests", "tutorials"])
def test_every_file_names_its_licence(folder):
    for path in (ROOT.parent / folder).rglob("*.py"):
        # A tutorial must begin with its notebook header; the line stands under its title.
        lines = path.read_text().splitlines()
        assert "# SPDX-License-Identifier: Apache-2.0" in lines[: 20 if folder == "tutorials" else 1], path
