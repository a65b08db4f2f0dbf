"""A run whose entries move goes on from each of its checkpoints to the same bits, in the trainer."""

import shutil

import pytest
from safetensors.torch import load_file

from efftune.train import checkpoint
from tests.train.conftest import llama, trainer

STEPS = 4


@pytest.mark.parametrize("recipe", ["lift(rank=4, every=2)", "spiel(every=2, accumulate=1, criterion='ma')"])
def test_from_checkpoints_around_a_move_to_the_same_bits(recipe, tmp_path):
    settings = dict(recipe=recipe, model=llama(num_hidden_layers=1), steps=STEPS, save_every=1, keep_last=STEPS)
    trainer(run=tmp_path / "whole", **settings).fit()
    saved = checkpoint.steps_in(tmp_path / "whole" / "checkpoints")
    before, after, last = (load_file(path / checkpoint.TRAINED) for path in (saved[0], saved[1], saved[-1]))
    assert not any(name.removeprefix("buffer:") in last for name in last if name.startswith("buffer:"))  # once each
    places = [name for name in last if name.endswith("q_proj.indices")]
    assert places and any(not before[n].equal(after[n]) for n in places if n in before)
    for path in saved[:2]:
        run = tmp_path / path.name
        run.mkdir()
        shutil.copytree(path, run / "checkpoints" / path.name)
        trainer(run=run, resumed=True, **settings | {"model": llama(num_hidden_layers=1)}).fit()
        end = checkpoint.steps_in(run / "checkpoints")[-1]
        for name in (checkpoint.TRAINED, checkpoint.REST):
            ours, theirs = load_file(end / name), load_file(saved[-1] / name)
            assert ours.keys() == theirs.keys() and all(ours[n].equal(theirs[n]) for n in ours), path
