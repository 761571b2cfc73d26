# SPDX-License-Identifier: Apache-2.0
"""Reference draws of particle targets: what is shipped, and the command that makes it."""

import json
import math

import numpy as np
import pytest
import torch

from pyro_sm.__main__ import main
from pyro_sm.bench.commands.references import symmetrised
from pyro_sm.density import value_and_score
from pyro_sm.targets import DoubleWellParticles, LennardJones
from pyro_sm.targets.reference_draws import load_draws, load_provenance

pytestmark = pytest.mark.usefixtures("float64")
SHIPPED = {"dw4": DoubleWellParticles, "lj13": LennardJones, "lj55": lambda dtype=None: LennardJones(55, dtype=dtype)}


@pytest.mark.parametrize("name", SHIPPED)
def test_draws_agree_with_their_provenance(name):
    target, found = SHIPPED[name](), load_provenance(name)
    z = target.reference_draws()
    assert z.shape == (2000, target.dim)
    assert z.dtype == torch.float64
    energy = -target.log_prob(z)
    # Stored as float32: energies of touching particles lose the fourth digit, not the third.
    assert float(energy.mean()) == pytest.approx(found["energy"]["mean"], abs=1e-3)
    assert float(energy.std()) == pytest.approx(found["energy"]["sd"], abs=1e-3)
    assert found["energy"]["split_rhat"] < 1.01
    assert found["squared_radius"]["split_rhat"] < 1.01
    assert found["energy"]["effective_draws"] > 1000
    assert all(rung["swap_rate"] > 0.2 for rung in found["ladder"][:-1])
    virial = found["virial"]
    assert abs(virial["mean"] - target.dim) < 4 * virial["se"]
    _, score = value_and_score(target.log_prob, z)
    assert float(-(z * score).sum(1).mean()) == pytest.approx(virial["mean"], abs=0.05)


def test_published_mean_energy_of_lennard_jones():
    energy = load_provenance("lj13")["energy"]
    assert abs(energy["mean"] + 43.13) < 4 * energy["se"] < 1
    assert energy["sd"] == pytest.approx(7.02, abs=0.4)


def test_double_well_mean_energy_by_importance_sampling():
    """Proposal: squared radius from a gamma law of mean 27.5 and sd 8, any direction."""
    target = DoubleWellParticles()
    law = torch.distributions.Gamma(11.8, 11.8 / 27.5)
    square = law.sample((1_000_000,))
    z = square.sqrt()[:, None] * torch.nn.functional.normalize(torch.randn(len(square), 6), dim=1)
    log_p = target.log_prob(z)
    w = torch.softmax(log_p - law.log_prob(square) + 2 * square.log(), 0)  # |z|⁵ d|z| is s² ds / 2
    truth = -float(w @ log_p)
    error = float((w * (log_p + truth)).norm())
    energy = load_provenance("dw4")["energy"]
    assert error < 0.08
    assert abs(energy["mean"] - truth) < 4 * math.hypot(energy["se"], error)


@pytest.mark.parametrize("name", SHIPPED)
def test_draws_are_symmetric(name):
    """No particle and no axis is special: coordinates have mean zero and one variance for all."""
    target = SHIPPED[name]()
    x = target.particles.to_positions(target.reference_draws())
    assert float((x.mean(0) / (x.std(0) / math.sqrt(len(x)))).abs().max()) < 5
    variance, error = x.var(0), x.square().std(0) / math.sqrt(len(x))
    assert float(((variance - variance.mean()) / error).abs().max()) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(dtype):
    assert DoubleWellParticles(dtype=dtype).reference_draws().dtype == dtype


@pytest.mark.parametrize("target", [LennardJones(5), DoubleWellParticles(4, 3), LennardJones(13, 2)])
def test_systems_without_draws(target):
    with pytest.raises(ValueError, match="there are no reference draws of"):
        target.reference_draws()


def test_names_without_files():
    with pytest.raises(ValueError, match="'lj0': make them with `bench references`"):
        load_draws("lj0", torch.float32)
    with pytest.raises(ValueError, match="'lj0': make them with `bench references`"):
        load_provenance("lj0")


@pytest.mark.parametrize("name", SHIPPED)
def test_symmetrised_keeps_energies_and_forgets_the_rest(name):
    target = SHIPPED[name]()
    z = target.reference_draws()[:50]
    moved = symmetrised(z, target.particles)
    torch.testing.assert_close(target.log_prob(moved), target.log_prob(z))
    assert float((moved - z).norm(dim=1).min()) > 0.1
    same = symmetrised(z[:1].expand(4000, -1), target.particles)
    x = target.particles.to_positions(same)
    assert float((x.mean(0) / (x.std(0) / math.sqrt(4000))).abs().max()) < 5


def test_the_command_writes_draws_and_provenance(tmp_path, capsys):
    command = ["bench", "references", "--targets", "dw4", "--num-warmup", "3", "--num-draws", "8", "--thin", "2"]
    assert main([*command, "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dw4: 320 draws; energy -")
    with np.load(tmp_path / "new" / "dw4.npz") as content:
        assert content["latents"].shape == (320, 6)
        assert content["latents"].dtype == np.float32
        energy = DoubleWellParticles().energy(
            DoubleWellParticles().particles.to_positions(torch.from_numpy(content["latents"]).double())
        )
    found = json.loads((tmp_path / "new" / "dw4.json").read_text())
    assert float(energy.mean()) == pytest.approx(found["energy"]["mean"], abs=1e-3)
    assert found["settings"]["sweeps per chain"] == 16
    assert found["density_evaluations"] == 40 * 5 + 19 * 40 * 5 * 5
    assert found["virial"]["expected"] == 6
    assert main([*command, "--out", str(tmp_path / "again")]) == 0
    with np.load(tmp_path / "new" / "dw4.npz") as first, np.load(tmp_path / "again" / "dw4.npz") as second:
        assert np.array_equal(first["latents"], second["latents"])


def test_an_unknown_target(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "references", "--targets", "dw5", "--out", "x"])
    assert "invalid choice: 'dw5'" in capsys.readouterr().err
