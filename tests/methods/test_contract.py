"""One table sends every method through the same promises: every two methods that combine are in one of its recipes.

A recipe trains once, on a model with a batch norm, a layer that is called twice and a narrow one; the tests look at
what came of it.
"""

import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import efftune
from efftune.interop.transformers import blocks, groups
from efftune.linear import Linear, Nothing
from efftune.linear.picks import columns_of, entries_of
from efftune.methods import available
from efftune.methods._base import ESTIMATES
from efftune.recipe import parse
from efftune.tuner import Tuner
from tests.methods import matrix
from tests.methods.models import batch, contract_model, logits, loss_fn, prepared, train

RECIPES = matrix.complete()
CASES = [pytest.param((recipe, "cpu"), id=recipe) for recipe in RECIPES]
if torch.cuda.is_available():
    CASES += [pytest.param((recipe, "cuda"), id=f"{recipe}-gpu", marks=pytest.mark.gpu) for recipe in RECIPES]
FIRST = 3  # steps, after which another run with the same seed is compared


def zeroth_order(recipe: str) -> bool:
    return any(method.place == ESTIMATES and method.overrides("optimizer") for method in parse(recipe))


def model_of(recipe: str) -> nn.Module:
    """Of the rows that are computed, two layers show what there is to see."""
    return contract_model(layers=3 if recipe in matrix.RECIPES else 2)


@cache
def plain_logits(device: str, layers: int) -> Tensor:
    return logits(contract_model(layers=layers).to(device))


def trained_of(tuner: Tuner) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tuner.named_delta().items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def statistics(model: nn.Module) -> set[str]:
    """The names of the buffers that training changes."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)}
    return {f"{name}.{buffer}" for name, m in norms.items() for buffer, _ in m.named_buffers()}


@dataclass
class Run:
    """What a recipe did to the model."""

    recipe: str
    device: str
    applied: Tensor  # logits before training
    trained: list[str]
    in_optimizer: bool  # it has exactly what trains
    summary: str
    count: int  # of what trains at first
    losses: list[float]
    first: dict[str, Tensor]  # what trains after FIRST steps
    moved: list[str]
    frozen_moved: list[str]
    frozen_grads: list[str]
    batches: int  # that the batch norm counted
    logits: Tensor
    saved: Path
    name: str  # of the recipe, by the tuner
    merged: nn.Module
    merged_logits: Tensor


@pytest.fixture(scope="module", autouse=True)
def tried_once():
    """The blocks of all models here are alike, and `apply` tries them anew for each of 200: a quarter of the time. What
    it finds it finds by a key of all that a block is but its weights, as within one model; tests/nn tests the trial.
    Likewise which layers of a block read one tensor, which is found at its first call."""
    known, once, found, readers = {}, blocks._once, {}, groups.readers

    def reads(module, args, kwargs):
        children = [(name, type(child)) for name, child in module._modules.items()]
        key = (type(module), *children, len(args), *sorted(kwargs))
        if key not in found:
            found[key] = readers(module, args, kwargs)
        return found[key]

    with mock.patch.object(blocks, "_once", lambda _, *asked: once(known, *asked)):
        with mock.patch.object(groups, "readers", reads):
            yield


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def run(case, tmp_path_factory) -> Run:
    (recipe, device), saved = case, tmp_path_factory.mktemp("saved")
    lr, steps, _ = RECIPES[recipe]
    tuner = prepared(model_of(recipe), recipe, device)
    applied, summary = logits(tuner.model), tuner.summary()
    count = sum(p.numel() for p in tuner.named_trained().values())
    optimizer, trained = tuner.optimizer(lr=lr), tuner.named_trained()
    registered = {id(p) for group in optimizer.param_groups for p in group["params"]}
    in_place = {n: m for n, m in tuner.model.named_modules() if isinstance(m, Linear) and m.delta.in_place}
    picked = {n: m for n, m in tuner.model.named_modules() if entries_of(m) or columns_of(m)}
    beside = {f"{n}.{name}" for n, m in {**in_place, **picked}.items() for name in m.delta.names}

    def tensors():
        """W as it was stored, where a delta writes into it."""
        for layer in in_place.values():
            layer.take_back()
        return {n: t for n, t in (*tuner.model.named_parameters(), *tuner.model.named_buffers())}

    before = {name: tensor.detach().clone() for name, tensor in tensors().items()}
    torch.manual_seed(7)
    losses = train(tuner, optimizer, FIRST, batch(device=device))
    first = trained_of(tuner)
    losses += train(tuner, optimizer, steps - FIRST, batch(device=device))
    moved = [name for name, tensor in tensors().items() if not torch.equal(tensor, before[name])]
    grads = [name for name, tensor in tensors().items() if tensor.grad is not None]
    free = {*trained, *statistics(tuner.model), *beside}
    facts = dict(
        trained=list(trained), in_optimizer=registered == {id(p) for p in trained.values()}, summary=summary,
        count=count, moved=[n for n in moved if n in trained],
        frozen_moved=[n for n in moved if n not in free], frozen_grads=[n for n in grads if n not in trained],
        batches=int(tuner.model.model.norm[1].num_batches_tracked), name=tuner.recipe,
    )  # fmt: skip
    after = logits(tuner.model)
    tuner.save(saved)
    merged = tuner.merge()
    return Run(
        recipe, device, applied, losses=losses, first=first, logits=after, saved=saved, merged=merged,
        merged_logits=logits(merged), **facts,
    )  # fmt: skip


def test_frozen_stays_frozen_the_loss_falls_and_the_optimizer_sees_what_trains(run):
    assert run.trained and run.in_optimizer
    assert run.losses[-1] < RECIPES[run.recipe][2] * run.losses[0]
    assert not run.frozen_moved and not run.frozen_grads
    assert run.moved


def test_running_statistics_see_each_batch_once(run):
    """Whatever else a method runs: to measure, to draw, to recompute. Zeroth order evaluates."""
    assert run.batches == (0 if zeroth_order(run.recipe) else len(run.losses))


def test_an_applied_recipe_changes_nothing_before_training(run):
    plain = plain_logits(run.device, len(model_of(run.recipe).model.layers))
    if "int8" in matrix.row_of(run.recipe):
        assert (run.applied - plain).norm() < 0.02 * plain.norm()
    else:  # the norms of efftune.nn round once where transformers rounds twice
        torch.testing.assert_close(run.applied, plain, rtol=1e-5, atol=1e-6)
        without_blocks = logits(prepared(model_of(run.recipe), run.recipe, run.device, blocks=False).model)
        same_bits = run.device == "cpu"  # a GPU has another kernel for the product with an adapter
        torch.testing.assert_close(without_blocks, plain, **({"rtol": 0, "atol": 0} if same_bits else {}))


def test_save_and_load_give_the_same_outputs(run):
    again = efftune.load(model_of(run.recipe).to(run.device), run.saved)
    assert again.recipe == run.name
    assert torch.equal(logits(again.model), run.logits)


def test_merge_equals_unmerged(run):
    assert not any(isinstance(m, Linear) for m in run.merged.modules())
    assert set(run.merged.state_dict()) == set(
        model_of(run.recipe).state_dict()
    )  # a plain checkpoint of the model's class
    torch.testing.assert_close(run.merged_logits, run.logits, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_bits(run):
    """On a GPU, where some of torch's own sums are in any order: the same draws."""
    tuner = prepared(model_of(run.recipe), run.recipe, run.device)
    start = trained_of(tuner)
    torch.manual_seed(7)
    train(tuner, tuner.optimizer(lr=RECIPES[run.recipe][0]), FIRST, batch(device=run.device))
    again = trained_of(tuner)
    if run.device == "cpu":
        assert all(torch.equal(again[name], run.first[name]) for name in again)
    else:
        assert (flat(again) - flat(run.first)).norm() < 0.05 * (flat(again) - flat(start)).norm()


def test_summary_counts_what_trains(run):
    assert f"{run.count:,} parameters" in run.summary and run.name in run.summary


def float64_loss(model, ids):
    """`loss_fn` without what transformers rounds to float32."""
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_four_micro_batches_equal_one(case):
    """Losses as means over equal micro-batches, scaled by 1/4: the same gradient up to float32 sums. Of zeroth order,
    whose scalar is a difference of losses over 2ε, in float64: rounding in float32 may be a large part of the step."""
    recipe, device = case
    if any(getattr(method, "scorer", None) == "gradient" for method in parse(recipe)):
        pytest.skip("what trains follows from the first micro-batch")
    if any(getattr(method, "criterion", None) == "ma" for method in parse(recipe)):
        pytest.skip("its optimizer's first step has the sign of a gradient and not its size")
    results = []
    for parts in (1, 4):
        model = model_of(recipe).double() if zeroth_order(recipe) else model_of(recipe)
        tuner = prepared(model, recipe.replace("lora_dropout=0.1, ", ""), device)
        tuner.model.train()
        tuner.model.model.norm[1].eval()  # its results are those of a batch
        start = flat(trained_of(tuner))
        optimizer = tuner.optimizer(lr=1.0) if zeroth_order(recipe) else torch.optim.SGD(tuner.param_groups(), lr=0.5)
        tuner.attach(optimizer)
        # Draws differ between micro-batches, but for directions, which are those of the step.
        with tuner.exactly() if not zeroth_order(recipe) else nullcontext():
            for chunk in batch(device=device).chunk(parts):
                tuner.backward(chunk, float64_loss if zeroth_order(recipe) else loss_fn, scale=1 / parts)
        optimizer.step()
        results.append(flat(trained_of(tuner)))
    if zeroth_order(recipe):
        assert (results[0] - results[1]).norm() <= 1e-5 * (results[0] - start).norm()
    else:
        torch.testing.assert_close(*results, rtol=1e-3, atol=2e-5)


# The table


def together(recipe: str) -> set[str]:
    return {method.name for method in parse(recipe)}


def test_every_method_is_in_the_table():
    assert set().union(*map(together, RECIPES)) == set(available())


def test_every_pair_that_combines_is_in_the_table():
    rows = {pair for recipe in RECIPES for pair in matrix.pairs(matrix.row_of(recipe))}
    places = [(which, name) for which in matrix.AXES for name in matrix.values()[which]]
    wanted = {p for p in itertools.combinations(places, 2) if p[0][0] != p[1][0] and matrix.combine(*p)}
    assert wanted <= rows
    for pair in matrix.siblings():
        if matrix.refusal(matrix.sibling_recipe(*pair)) is None:
            assert any(together(recipe).issuperset(pair) for recipe in RECIPES), pair
    assert all(matrix.refusal(recipe) is None for recipe in RECIPES)


REFUSED_PAIRS = {
    *(
        (matrix.text(row), (one[1], other[1]))
        for one, other in itertools.combinations([(w, n) for w in matrix.AXES for n in matrix.values()[w]], 2)
        if one[0] != other[0] and not matrix.combine(one, other)
        for row in matrix.completions(one, other)
    ),
    *((matrix.sibling_recipe(*p), p) for p in matrix.siblings() if matrix.refusal(matrix.sibling_recipe(*p))),
}


@pytest.mark.parametrize("recipe", sorted({recipe for recipe, _ in REFUSED_PAIRS}))
def test_every_pair_that_does_not_combine_is_refused_in_words(recipe):
    """A sentence with a remedy, which names a method, or what it does."""
    words = matrix.refusal(recipe)
    assert words.endswith(".") and "\n" not in words
    assert any(remedy in words for remedy in ("; use ", "; leave ", "; put ", "; add ", "; give ", "; a recipe takes"))
    assert any(name in words.lower() for name in {*available(), "samples its rows", "run again"})


@pytest.mark.parametrize("contract", ["base", "delta", "keep"])
def test_every_kind_is_in_the_table(contract):
    """But for Nothing: what keeps nothing is for layers made by hand."""
    seen = {type(getattr(layer, contract)) for recipe in RECIPES for layer in matrix.linears(recipe)}
    assert matrix.kinds(matrix.CONTRACTS[contract]) <= {*seen, Nothing}


# What models also have


class Normed(nn.Module):
    """A stack of alike blocks with a batch norm inside each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())  # noqa: E731
        self.layers = nn.ModuleList(block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("recipe", ["lora(r=2) + recompute", "full + recompute + mesa"])
def test_blocks_that_run_again_do_not_count_a_batch_twice(recipe):
    x, buffers = torch.randn(16, 6), []
    for text in (recipe, recipe.replace(" + recompute", "")):
        torch.manual_seed(1)
        tuner = efftune.apply(Normed(), text)
        tuner.backward(x, lambda model, x: model(x).square().mean())
        buffers.append(dict(tuner.model.named_buffers()))
    for name, buffer in buffers[0].items():
        assert torch.equal(buffer, buffers[1][name]), name


def test_samples_that_a_batch_norm_joins_are_refused_and_leave_no_trace():
    tuner = efftune.apply(Normed(), "full + vcas")
    tuner.optimizer(lr=0.1)
    with pytest.raises(efftune.EfftuneError, match="samples depend on each other"):
        tuner.backward(torch.randn(16, 6), lambda model, x: model(x).square().mean())
    assert all(torch.equal(b, Normed().get_buffer(name)) for name, b in tuner.model.named_buffers())


@pytest.mark.parametrize("base", ["", "int8(group=16) + "])
def test_a_layer_narrower_than_the_rank_is_refused_by_name(base):
    with pytest.raises(efftune.EfftuneError, match=r"0.mlp.narrow: r=6 exceeds .* \(5, 32\); choose a smaller r"):
        efftune.apply(contract_model(), base + "lora(r=6)")
