"""mesa(max_error=...): bits by measurement."""

import math

import pytest
import torch

import efftune
from efftune import EfftuneError
from efftune.linear import Exact
from efftune.linear.keep.quantized import Quantized
from efftune.memory.meter import saved_for_backward
from efftune.methods.quantized.mesa import EXACT, _block, allocate, total
from tests.methods.models import batch, llama, loss_fn


def tuned(recipe, seed=0):
    torch.manual_seed(seed)
    tuner = efftune.apply(llama(seed=seed), recipe)
    torch.manual_seed(seed + 1)
    return tuner


def gradient(tuner, data=None):
    tuner.model.zero_grad()
    tuner.backward(batch() if data is None else data, loss_fn)
    return {name: p.grad.clone() for name, p in tuner.named_trained().items()}


def keeps(tuner):
    return {n: m.keep for n, m in tuner.model.named_modules() if hasattr(m, "keep")}


def kept(tuner):
    return saved_for_backward(tuner.model, lambda: loss_fn(tuner.model, batch())).total


def worst_error(tuner, draws=8):
    """√(E‖g − g*‖² / ‖g*‖²) of the worst block, over all coordinates, against exact keeps."""
    with tuner.exactly():
        exact = gradient(tuner)
    error, size = {}, {}
    for _ in range(draws):
        for name, g in gradient(tuner).items():
            block = _block(name)
            error[block] = error.get(block, 0.0) + float((g - exact[name]).square().sum()) / draws
    for name, g in exact.items():
        size[_block(name)] = size.get(_block(name), 0.0) + float(g.square().sum())
    return max(math.sqrt(error[block] / size[block]) for block in size)


@pytest.mark.parametrize(
    "recipe, error", [("full", 0.05), ("lora(r=4)", 0.02), ("full + wtacrs(ratio=0.5, min_rows=4)", 0.05)]
)
def test_the_error_is_what_was_asked_for_and_bytes_lie_between_four_and_eight_bits(recipe, error):
    uniform = tuned(f"{recipe} + mesa(bits=4)")
    if "wtacrs" not in recipe:  # whose own variance comes on top
        assert worst_error(uniform) > 1.2 * error
    tuner = tuned(f"{recipe} + mesa(bits=4, max_error={error})")
    assert "4 bits everywhere, until" in tuner.summary()
    gradient(tuner)
    assert "gradient error at most" in tuner.summary()
    if "wtacrs" not in recipe:
        assert worst_error(tuner) < 1.2 * error
    assert {k.bits for k in keeps(tuner).values() if isinstance(k, Quantized)} == {4, 8}
    assert kept(uniform) < kept(tuner) < kept(tuned(f"{recipe} + mesa(bits=8)")) * 1.01


def test_what_needs_nothing_gets_nothing_and_measuring_leaves_no_trace():
    plain, measured = tuned("full + mesa(bits=4)"), tuned("full + mesa(bits=4, max_error=100.0)")
    for tuner in (plain, measured):
        tuner.model.get_parameter("lm_head.weight").grad = torch.ones(96, 32)
        torch.manual_seed(2)
        tuner.backward(batch(), loss_fn)  # adds to the gradient that is there
    assert keeps(plain) == keeps(measured)
    for (name, p), q in zip(plain.model.named_parameters(), measured.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    torch.manual_seed(3)
    gradient(plain)
    expected = torch.rand(3)
    torch.manual_seed(3)
    gradient(measured)
    assert torch.equal(torch.rand(3), expected)


def test_an_error_below_that_of_eight_bits_makes_keeps_exact():
    for bits in (4, 8):
        tuner = tuned(f"full + mesa(bits={bits}, max_error=1e-6)")
        gradient(tuner)
        assert any(keep == Exact() for keep in keeps(tuner).values())
        assert worst_error(tuner) < 2e-6


def test_a_checkpoint_carries_the_choice_and_exactly_leaves_it_alone():
    tuner = tuned("full + mesa(bits=4, max_error=0.05)")
    with tuner.exactly():
        gradient(tuner)
        assert set(keeps(tuner).values()) == {Exact()}
    assert {keep.bits for keep in keeps(tuner).values()} == {4}  # not measured yet
    gradient(tuner)
    chosen = keeps(tuner)
    again = tuned("full + mesa(bits=4, max_error=0.05)")
    for _ in range(2):  # onto a model that has its own choice, too
        again.load_state_dict(tuner.state_dict())
        assert keeps(again) == chosen
        gradient(again)
        assert keeps(again) == chosen
    tuner.remove()
    assert "mesa" not in vars(tuner.model)


def test_a_loss_that_is_not_finite_is_measured_again_later():
    tuner = tuned("full + mesa(bits=4, max_error=0.05)")
    tuner.backward(batch(), lambda model, ids: loss_fn(model, ids) * math.inf)
    assert {keep.bits for keep in keeps(tuner).values()} == {4}
    gradient(tuner)
    assert {keep.bits for keep in keeps(tuner).values() if isinstance(keep, Quantized)} == {4, 8}


def test_a_failed_measurement_leaves_keeps_as_they_were():
    tuner = tuned("full + mesa(bits=4, max_error=0.05)")
    with pytest.raises(ZeroDivisionError):
        tuner.backward(batch(), lambda model, ids: 1 / 0)
    assert {keep.bits for keep in keeps(tuner).values()} == {4}


def test_a_loop_of_ones_own_is_told():
    tuner = tuned("full + mesa(bits=4, max_error=0.05)")
    optimizer = tuner.optimizer(lr=1e-3)
    loss_fn(tuner.model, batch()).backward()
    with pytest.warns(UserWarning, match="not measured yet .* everything stays at 4 bits"):
        optimizer.step()


def test_settings_out_of_range():
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(EfftuneError, match="above 0"):
            efftune.apply(llama(), f"full + mesa(max_error={value})" if value == value else [_mesa(value)])


def _mesa(value):
    from efftune.methods.quantized.mesa import Mesa

    return Mesa(max_error=value)


def test_allocation():
    """Against every choice there is: within the limit, and no worse than twice the least bytes."""
    import itertools

    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        names, blocks = "abcd", "xyz"
        size = {n: float(torch.randint(1, 20, (), generator=generator)) for n in names}
        costs = {n: {4: size[n], 8: 2 * size[n], EXACT: 4 * size[n]} for n in names}
        errors = {n: {b: float(torch.rand((), generator=generator) ** 3) for b in blocks} for n in names}
        limit = float(torch.logspace(-4, 0.5, 20)[trial])

        def worst(chosen, errors=errors):
            return max(total(4, chosen, errors).values())

        def cost(chosen, costs=costs):
            return sum(costs[n][b] for n, b in chosen.items())

        every = (dict(zip(names, c, strict=True)) for c in itertools.product((4, 8, EXACT), repeat=4))
        least = min(cost(c) for c in every if worst(c) <= limit)
        found = allocate(4, costs, errors, limit)
        assert worst(found) <= limit and cost(found) <= 1.5 * least
    assert allocate(4, {"a": {4: 1, 8: 2, EXACT: 4}}, {"a": {"x": 0.1}}, 0.2) == {"a": 4}


def test_nothing_to_choose_is_not_measured_again_and_running_statistics_stay():
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])
            self.norm = torch.nn.BatchNorm1d(8)

        def forward(self, x):
            return self.layers[1](torch.tanh(self.norm(self.layers[0](x))))

    for recipe, passes in (
        ("full + mesa(bits=4, max_error=0.3)", None),
        ("full + wtacrs(min_rows=2) + mesa(max_error=0.1)", 1),
    ):
        model, x, calls = Normed(), torch.randn(32, 8), [0]
        tuner = efftune.apply(model, recipe, blocks=False)
        optimizer = tuner.optimizer(lr=1e-3)

        def loss(m, x, calls=calls):
            calls[0] += 1
            return m(x).square().mean()

        tuner.backward(x, loss)
        assert int(model.norm.num_batches_tracked) == 1
        first, calls[0] = calls[0], 0
        optimizer.step()  # warns of nothing
        tuner.backward(x, loss)
        assert calls[0] == 1 and (passes is None or first == passes)
        assert "until" not in tuner.summary() and ("nothing to choose" in tuner.summary()) == (passes == 1)
        again = efftune.apply(Normed(), recipe, blocks=False)
        again.load_state_dict(tuner.state_dict())
        calls[0] = 0
        again.backward(x, loss)
        assert calls[0] == 1


def test_a_block_whose_gradient_is_not_finite_is_not_chosen_for():
    tuner, handles = tuned("lora(r=4) + mesa(bits=4, max_error=0.05)"), []

    def loss(model, ids):
        inner = model.model.layers[1].register_full_backward_hook(lambda m, gi, go: (gi[0] * math.nan,))
        handles.append(inner)
        return loss_fn(model, ids)

    tuner.backward(batch(), loss)
    assert {keep.bits for keep in keeps(tuner).values()} == {4} and "4 bits everywhere, until" in tuner.summary()


def test_a_checkpoint_from_before_the_measurement_undoes_one():
    tuner = tuned("full + mesa(bits=4, max_error=0.05)")
    before = tuner.state_dict()
    gradient(tuner)
    assert {keep.bits for keep in keeps(tuner).values() if isinstance(keep, Quantized)} == {4, 8}
    tuner.load_state_dict(before)
    assert {keep.bits for keep in keeps(tuner).values()} == {4}
