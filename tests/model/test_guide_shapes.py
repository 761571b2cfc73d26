# SPDX-License-Identifier: Apache-2.0
"""A guide whose site has another shape than the model's is refused by whatever trains it, or draws from it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoNormal
from pyro.poutine import block

from pyro_sm import FisherDivergence, MixtureFisherDivergence, SteinDiscrepancy, temper_guide
from pyro_sm.diagnostics import check_guide, to_arviz
from pyro_sm.diagnostics.guide_draws import draw_from_guide
from pyro_sm.model.density import ModelDensity


def of_shape(*shape, to_event=None):
    """A standard normal model of this shape, with data; all dimensions events unless told."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(shape), 1.0).to_event(to_event))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x.sum() + s, 1.0), obs=torch.tensor(0.5))

    return model


def by_hand(*shape):
    def guide():
        loc = pyro.param("loc", torch.zeros(shape))
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(len(shape)))
        pyro.sample("s", dist.LogNormal(pyro.param("s_loc", torch.zeros(())), 1.0))

    return guide


def automatic(kind):
    def made(*shape):
        guide = kind(of_shape(*shape))
        guide()
        return guide

    return made


def in_a_list(*shape):
    model = of_shape(*shape)
    guide = AutoGuideList(model)
    guide.append(AutoDiagonalNormal(block(model, expose=["x"])))
    guide.append(AutoNormal(block(model, expose=["s"])))
    guide()
    return guide


GUIDES = {
    "by hand": by_hand,
    "AutoNormal": automatic(AutoNormal),
    "AutoDiagonalNormal": automatic(AutoDiagonalNormal),
    "a list": in_a_list,
}
SHAPES = [((2, 1), (2,)), ((2,), (2, 1)), ((1,), (2,)), ((3, 2), (2, 3)), ((2,), ())]
LOSSES = [FisherDivergence, MixtureFisherDivergence, SteinDiscrepancy]


def words(theirs, mine):
    """Either both shapes of the site, or where only sizes are known, both sizes."""
    return (
        rf"site 'x'.* of shape \({', '.join(map(str, theirs))},?\) in \w+, of shape "
        rf"\({', '.join(map(str, mine))},?\) in the model|covers the latent sites .*'x'|site 'x': AutoNormal holds"
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize(("theirs", "mine"), SHAPES)
def test_divergences_refuse(loss, kind, theirs, mine):
    guide = GUIDES[kind](*theirs)
    svi = SVI(of_shape(*mine), guide, pyro.optim.Adam({"lr": 1e-3}), loss())
    with pytest.raises(ValueError, match=words(theirs, mine)):
        svi.step()


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize(("theirs", "mine"), SHAPES)
def test_whatever_draws_refuses(kind, theirs, mine):
    guide, model = GUIDES[kind](*theirs), of_shape(*mine)
    for draw in (check_guide, to_arviz, temper_guide):
        with pytest.raises(ValueError, match=words(theirs, mine)):
            draw(model, guide)
    with pytest.raises(ValueError, match=words(theirs, mine)):
        draw_from_guide(guide, ModelDensity(model), 8)


@pytest.mark.parametrize("loss", LOSSES)
def test_point_estimates_are_refused_as_such(loss):
    guide = automatic(AutoDelta)(2, 1)
    with pytest.raises(TypeError, match="point estimate"):
        SVI(of_shape(2), guide, pyro.optim.Adam({"lr": 1e-3}), loss()).step()


@pytest.mark.parametrize("loss", LOSSES)
def test_dimensions_of_size_one_on_the_left_are_no_others(loss):
    """As Pyro's own losses see it."""
    svi = SVI(of_shape(2), by_hand(1, 2), pyro.optim.Adam({"lr": 1e-3}), loss())
    assert math.isfinite(svi.step())
