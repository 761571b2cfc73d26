# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: atomic to write, harmless to read, and refused in words when they are not what they should be."""

import math
import os
import pickle
import random
import signal

import pytest
import torch

from pyro_sm import CheckpointError
from pyro_sm.training.checkpoint import FORMAT, read_checkpoint, write_checkpoint

CONTENT = {
    "numbers": [1, 2.5, math.inf, True, None],
    "words": {"a": "b"},
    "tensors": [torch.arange(1000.0, dtype=torch.float64), torch.tensor([True, False]), torch.empty(0, 3)],
    "pairs": [(1, torch.ones(2)), (2, torch.zeros(2))],
}


@pytest.fixture
def path(tmp_path):
    """A checkpoint on disk."""
    write_checkpoint(tmp_path / "state.pt", CONTENT)
    return tmp_path / "state.pt"


def test_round_trip(path):
    content = read_checkpoint(path)
    assert content.pop("format") == FORMAT
    assert content.keys() == CONTENT.keys()
    assert content["numbers"] == CONTENT["numbers"]
    assert content["words"] == CONTENT["words"]
    for found, expected in zip(content["tensors"], CONTENT["tensors"], strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert read_checkpoint(str(path)).keys() == read_checkpoint(path).keys()


def test_nothing_but_data_is_needed_to_read_it(path):
    assert torch.load(path, weights_only=True)["words"] == {"a": "b"}


def test_overwriting_leaves_one_file(path):
    write_checkpoint(path, {"second": 2})
    assert read_checkpoint(path) == {"format": FORMAT, "second": 2}
    assert os.listdir(path.parent) == ["state.pt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
@pytest.mark.parametrize("place", ["torch.save", "os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_file(path, monkeypatch, place, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(place, fail)
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        write_checkpoint(path, {"second": 2})
    monkeypatch.undo()
    assert read_checkpoint(path)["words"] == {"a": "b"}
    assert os.listdir(path.parent) == ["state.pt"]


def test_an_interrupt_during_a_write_leaves_the_old_file(path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, {"second": 2})
    monkeypatch.undo()
    assert read_checkpoint(path)["words"] == {"a": "b"}
    assert os.listdir(path.parent) == ["state.pt"]


@pytest.mark.parametrize("place", ["torch.save", "os.fsync", "os.replace"])
def test_a_kill_during_a_write_leaves_the_old_file(path, place):
    """At once and without any clean-up, as by ``kill -9`` or a power cut, in the middle of each stage."""
    child = os.fork()
    if child == 0:
        module, name = place.split(".")
        module = {"torch": torch, "os": os}[module]
        real = getattr(module, name)

        def die(*args, **kwargs):
            if place == "torch.save":
                args[1].write(b"half a checkpoint")
                args[1].flush()
            elif place == "os.fsync":
                real(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, die)
        write_checkpoint(path, {"second": 2})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert read_checkpoint(path)["words"] == {"a": "b"}
    write_checkpoint(path, {"third": 3})
    assert read_checkpoint(path)["third"] == 3


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint '.*nowhere/state\.pt'"):
        write_checkpoint(tmp_path / "nowhere" / "state.pt", CONTENT)
    with pytest.raises(CheckpointError, match="cannot write"):
        write_checkpoint(tmp_path, CONTENT)  # a folder


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at '.*nothing\.pt'"):
        read_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"state\.pt' is damaged or not a checkpoint"):
        read_checkpoint(path)


def test_one_bit_flipped(path):
    """Wherever it is: either the file is refused, or the bit was in no one's data."""
    whole, generator = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(100):
        broken = bytearray(whole)
        broken[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(broken)
        try:
            content = read_checkpoint(path)
        except CheckpointError:
            refused += 1
            continue
        assert all(map(torch.equal, content["tensors"], CONTENT["tensors"]))
        assert content["numbers"] == CONTENT["numbers"]
        assert content["words"] == CONTENT["words"]
    assert refused > 50


def test_foreign_files(path):
    path.write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps({"format": FORMAT}))
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=r"not a pyro_sm checkpoint of format 2 \(found list\)"):
        read_checkpoint(path)
    torch.save({"model": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"\(found None\)"):
        read_checkpoint(path)
    torch.save({"format": FORMAT + 1}, path)
    with pytest.raises(CheckpointError, match=r"\(found 3\)"):
        read_checkpoint(path)


class Code:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_a_file_with_code_in_it_is_refused_and_not_run(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    torch.save({"format": FORMAT, "code": Code()}, path)
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
        read_checkpoint(path)
    assert not os.path.exists("executed")
