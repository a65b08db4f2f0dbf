"""Gradients of entries and columns by a keep that draws: those of entries are those of the whole weight by the same
draws. (Of columns the keep has these alone, and draws by their norms.)"""

import pytest
import torch

import efftune
from efftune import EfftuneError
from efftune.linear.picks import entries_of
from efftune.measure.verify import verify
from tests.methods.models import batch, llama, loss_fn
from tests.train.test_run import sentence

LINEAR = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


@pytest.fixture
def job(model_folder, write):
    rows = [{"question": sentence(i), "answer": sentence(i + 99)} for i in range(30)]
    return dict(model=str(model_folder), data=str(write("qa.jsonl", rows)), batch_size=4, seq_len=64, lr=1e-3)


@pytest.mark.parametrize(
    "recipe",
    [
        "lift(rank=8, density=0.1, every=2) + wtacrs(ratio=0.5)",  # other entries train in the steps before it measures
        "s2ft(ratio=0.2, scorer='gradient') + wtacrs(ratio=0.5)",
    ],
)
def test_verify_passes(job, recipe, capsys):
    results = verify({**job, "recipe": recipe}, seeds=12, batches=3, max_bias=0.05)
    trained = [r for r in results if not r.name.startswith("all, by keeps of")]
    assert len(trained) == 3 * (2 if "s2ft" in recipe else 7) and all(r.name.endswith(".values") for r in trained)
    assert max(r.error for r in trained) > 0.005
    assert "has a bias that is both significant" in capsys.readouterr().out


def test_verify_fails_on_what_is_biased(job):
    with pytest.raises(EfftuneError, match=r"gradients are biased; the most that of \S+\.values"):
        verify({**job, "recipe": "lift(rank=8, density=0.1) + wtacrs(ratio=0.3, sampler='topk', biased=True)"}, 6, 3)


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("keep", ["wtacrs(ratio=0.5)", "mesa(bits=4)"])
def test_the_draws_are_those_of_the_whole_weight(keep, blocks):
    gradients = []
    for recipe in (f"full(target_modules='{LINEAR}')", "shira(density=0.1)"):
        tuner = efftune.apply(llama(), f"{recipe} + {keep}", blocks=blocks)
        torch.manual_seed(0)
        tuner.backward(batch(), loss_fn)
        gradients.append({name: p.grad for name, p in tuner.named_trained().items()})
    assert len(gradients[1]) == 21
    for name, layer in tuner.model.named_modules():
        if entries_of(layer):
            whole = gradients[0][f"{name}.weight"].flatten()[layer.indices.long()]
            torch.testing.assert_close(gradients[1][f"{name}.values"], whole, rtol=1e-4, atol=1e-6)
