"""Layers that read one tensor work as one: the same values and gradients, whatever base, delta and keep they have, in
whatever order they are called, and each alone where something is not as expected."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from efftune import Linear
from efftune.linear import Dense, Exact, Int8, LoRA, NoDelta, Nothing
from efftune.linear.delta.dora import DoRA
from efftune.linear.delta.trained import Trained
from efftune.linear.group import Group
from efftune.linear.keep.quantized import Quantized
from efftune.linear.keep.sampled import Sampled
from tests.budget import assert_within_budget
from tests.linear.test_contracts import VALID, K, M, N, expected, inputs, made
from tests.linear.toys import Kronecker, Masked
from tests.saved import saved_bytes

LORA = LoRA(r=4, lora_alpha=6, dtype=None)


@contextlib.contextmanager
def together(layers):
    """As a module around the layers does while it runs."""
    group = Group(layers)
    for layer in layers:
        layer.group = group
    try:
        yield group
    finally:
        for layer in layers:
            del layer.group


def three(base=None, delta=LORA, keep=None, **settings):
    """Layers of different weights and of one kind."""
    layers = [made(base or Dense(), delta, keep, **settings) for _ in range(3)]
    for i, layer in enumerate(layers):
        torch.manual_seed(10 + i)
        for name in (*layer.base.learns, *layer.delta.names, "bias"):
            t = layer._parameters.get(name)
            if t is not None and not (isinstance(layer.base, Int8) and name == "scales"):
                t.data += 0.1 * torch.randn_like(t)
    return layers


def slopes(layers, m=M):
    torch.manual_seed(3)
    return [torch.randn(m, layer.out_features, dtype=layer.stored().dtype) for layer in layers]


def trained(layers):
    return [p for layer in layers for p in layer.parameters() if p.requires_grad]


def as_one(layers, x, dys, order=None):
    """ys, dx and gradients where the layers work as one, which is checked."""
    x = x.clone().requires_grad_()
    with together(layers) as group:
        ys = {i: layers[i](x) for i in order or range(len(layers))}
    assert len({y.grad_fn for y in ys.values()}) == 1 and not group.results and group.x is None
    ys = [ys[i] for i in range(len(layers))]
    return [y.detach() for y in ys], *torch.autograd.grad(ys, [x, *trained(layers)], dys)


def one_by_one(layers, x, dys):
    x = x.clone().requires_grad_()
    ys = [layer(x) for layer in layers]
    assert len({y.grad_fn for y in ys}) == len(layers)
    return [y.detach() for y in ys], *torch.autograd.grad(ys, [x, *trained(layers)], dys)


def assert_formula(layers, x, dys, found):
    rights = [expected(layer, x, dy) for layer, dy in zip(layers, dys, strict=True)]
    right = [sum(dx for _, dx, _ in rights), *(g for _, _, grads in rights for g in grads)]
    for got, right_one in zip((*found[0], *found[1:]), (*(y for y, _, _ in rights), *right), strict=True):
        torch.testing.assert_close(got, right_one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("base, delta", VALID, ids=str)
def test_values_and_gradients_are_those_of_the_formula(base, delta):
    layers, (x, _) = three(base, delta), inputs()
    assert_formula(layers, x, slopes(layers), as_one(layers, x, slopes(layers), order=(1, 2, 0)))


@pytest.mark.parametrize("base, delta", VALID, ids=str)
def test_a_delta_adds_its_dx_to_what_it_is_given(base, delta):
    """Also where another delta comes first, and where W is rotated."""
    layers, (x, _) = [made(Dense(), NoDelta()), made(base, delta), made(Dense(), LORA)], inputs()
    dys = slopes(layers)
    assert_formula(layers, x, dys, as_one(layers, x, dys))


def test_layers_of_different_sizes_bases_deltas_and_biases():
    torch.manual_seed(0)
    layers = [
        Linear.from_linear(nn.Linear(K, n, bias=bias, dtype=torch.float64).requires_grad_(False), base, delta)
        for n, bias, base, delta in (
            (N, True, Dense(), LORA), (4, False, Int8(8), LORA), (8, True, Dense(), LoRA(r=2, dtype=None)),
            (12, False, Dense(), Trained()), (16, False, Dense(), Kronecker()),
        )
    ]  # fmt: skip
    layers[0].bias.requires_grad_()  # an adapter and a bias
    for layer in layers:
        for name in ("lora_b", "kron_p"):
            if name in layer._parameters:
                nn.init.normal_(getattr(layer, name))
    x = torch.randn(2, 5, K, dtype=torch.float64)
    dys = [torch.randn(2, 5, layer.out_features, dtype=torch.float64) for layer in layers]
    for got, right in zip(flat(as_one(layers, x, dys)), flat(one_by_one(layers, x, dys)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def flat(found):
    return *found[0], *found[1:]


def by_hand(layers, x, dys, dtype, rounded=lambda t: t):
    """As `as_one`, of LoRA over a dense W, in dtype; `rounded` is applied where something is rounded to x.dtype."""
    ys, dhs, thin, grads, x = [], [], [], [], x.to(dtype)
    for layer, dy in zip(layers, dys, strict=True):
        a, b = (rounded(t.detach().to(dtype)) for t in layer.added())
        h, dh = rounded(layer.delta.scale * (x @ a.t())), rounded(layer.delta.scale * (dy.to(dtype) @ b))
        w, bias = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)
        ys.append(rounded(rounded(x @ w.t() + bias) + h @ b.t()))
        grads += [rounded(dh.t() @ x), rounded(dy.to(dtype).t() @ h)]
        dhs, thin = [*dhs, dh], [*thin, a]
    dx = rounded(torch.cat(dhs, 1) @ torch.cat(thin))
    for layer, dy in zip(layers, dys, strict=True):
        dx = rounded(dx + dy.to(dtype) @ layer.weight.detach().to(dtype))
    return *ys, dx, *grads


@pytest.mark.parametrize("m", [1, 0, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("delta", [LoRA(r=4), LoRA(r=3, dtype=None, lora_alpha=7)], ids=str)
def test_values_and_gradients_are_within_budget(delta, dtype, m):
    layers = [layer.to(dtype) for layer in three(delta=delta, dtype=torch.float32)]
    torch.manual_seed(5)
    x, dys = torch.randn(m, K).to(dtype), slopes(layers, m)
    oracle, in_float32 = by_hand(layers, x, dys, torch.float64), by_hand(layers, x, dys, torch.float32)
    rounded = by_hand(layers, x, dys, torch.float64, lambda t: t.to(dtype).double())
    for got, right, coarse, way in zip(flat(as_one(layers, x, dys)), oracle, in_float32, rounded, strict=True):
        assert_within_budget(got, right, coarse, way)


def test_what_nobody_uses_has_no_gradient_and_the_others_have_theirs():
    layers, (x, _) = three(), inputs()
    x.requires_grad_()
    with together(layers):
        ys = [layer(x) for layer in layers]
    (ys[1] * slopes(layers)[1]).sum().backward()
    assert all(p.grad is None for p in (*trained(layers[:1]), *trained(layers[2:])))
    _, dx, grads = expected(layers[1], x.detach(), slopes(layers)[1])
    for got, right in zip((x.grad, *(p.grad for p in trained(layers[1:2]))), (dx, *grads), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("delta", [LORA, DoRA(r=4, dtype=None), Masked(), NoDelta()], ids=str)
def test_who_is_not_called_is_not_waited_for(delta):
    layers, (x, _) = three(delta=delta), inputs()
    x.requires_grad_()
    with together(layers) as group:
        ys = [layers[2](x), layers[0](x)]
    assert ys[0].grad_fn is ys[1].grad_fn and list(group.results) == [layers[1]]
    dys = slopes(layers)
    called = [layers[2], layers[0]]
    found = torch.autograd.grad(ys, [x, *trained(called)], [dys[2], dys[0]])
    assert_formula(called, x.detach(), [dys[2], dys[0]], ([y.detach() for y in ys], *found))


def test_a_layer_that_is_called_twice_computes_alone_the_second_time():
    layers, (x, _) = three(), inputs()
    x.requires_grad_()
    with together(layers):
        ys = [layers[0](x), layers[1](x), layers[1](x), layers[0](x), layers[2](x)]
    assert ys[0].grad_fn is ys[1].grad_fn is ys[4].grad_fn
    assert len({y.grad_fn for y in ys}) == 3
    order, dys = (0, 1, 1, 0, 2), slopes([layers[i] for i in (0, 1, 1, 0, 2)])
    found = torch.autograd.grad(ys, [x, *trained(layers)], dys)
    alone = [layers[i](x) for i in order]
    for got, right in zip(found, torch.autograd.grad(alone, [x, *trained(layers)], dys), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_another_tensor_and_a_changed_one_are_computed_alone():
    layers, (x, _) = three(delta=NoDelta()), inputs()
    x = x.requires_grad_() * 1
    with together(layers):
        layers[0](x)
        other = layers[1](x + 1)
        x.mul_(2)
        changed = layers[2](x)
    torch.testing.assert_close(other, layers[1](x / 2 + 1))
    assert torch.equal(changed, layers[2](x))


@pytest.mark.parametrize("name", ["weight", "lora_b", "bias"])
@pytest.mark.parametrize("how", ["in place", "another"])
def test_a_layer_that_has_changed_since_computes_alone(name, how):
    layers, (x, _) = three(), inputs()
    with together(layers):
        layers[0](x)
        with torch.no_grad():
            p = getattr(layers[1], name)
            if how == "another":
                setattr(layers[1], name, nn.Parameter(p * 3, requires_grad=p.requires_grad))
            else:
                p.mul_(3)
        y = layers[1](x)
    assert torch.equal(y, layers[1](x))


@pytest.mark.parametrize("change", [lambda m: m.requires_grad_(False), lambda m: setattr(m, "keep", Nothing())])
def test_what_else_has_changed_since_is_seen(change):
    layers, (x, _) = three(delta=LoRA(r=4, dtype=None, freeze_a=True)), inputs()
    x.requires_grad_()
    with together(layers):
        first = layers[0](x)
        change(layers[1])
        assert layers[1](x).grad_fn is not first.grad_fn


def test_after_many_steps_too():
    """Versions are large numbers then, and no longer the same objects."""
    layers, (x, _) = three(), inputs()
    for p in trained(layers):
        for _ in range(300):
            p.data.mul_(1.0)
            torch._C._increment_version([p])
    as_one(layers, x, slopes(layers))


def compiled(layers, x):
    return torch.compile(lambda x: [layer(x) for layer in layers], backend="aot_eager", fullgraph=True)(x)


def under_autocast(layers, x):
    with torch.autocast("cpu", torch.bfloat16):
        return [layer(x) for layer in layers]


@pytest.mark.parametrize("call", [compiled, under_autocast])
def test_each_alone_where_nothing_is_gained_or_known(call):
    layers = three(dtype=torch.float32)
    x = torch.randn(M, K, requires_grad=True)
    right = call(layers, x)
    with together(layers) as group:
        ys = call(layers, x)
        assert group.x is None
    for got, alone in zip(ys, right, strict=True):
        assert torch.equal(got, alone) and got.requires_grad == alone.requires_grad


def test_without_gradients_the_bits_are_the_same():
    """As where a block is run again in backward. A result of one mode is not given in the other."""
    layers = three(dtype=torch.float32)
    x = torch.randn(M, K)
    with together(layers) as group:
        right = [layer(x) for layer in layers]
    with together(layers) as group, torch.no_grad():
        ys = [layer(x) for layer in layers]
        assert not group.results
    assert all(torch.equal(a, b) and not a.requires_grad and b.requires_grad for a, b in zip(ys, right, strict=True))
    for first, then in ((torch.no_grad, torch.enable_grad), (torch.enable_grad, torch.no_grad)):
        with together(layers):
            with first():
                layers[0](x)
            with then():
                assert layers[1](x).requires_grad == (then is torch.enable_grad)


def test_an_inference_tensor_has_no_version():
    layers = three(dtype=torch.float32)
    with torch.inference_mode():
        x = torch.randn(M, K)
    frozen = [layer.requires_grad_(False) for layer in layers]
    with together(frozen):
        assert torch.equal(frozen[0](x), frozen[0](x))


def test_in_evaluation_mode_and_in_two_modes():
    layers, (x, _) = three(), inputs()
    for modes in ((False, False, False), (True, False, True)):
        for layer, mode in zip(layers, modes, strict=True):
            layer.train(mode)
        dys = slopes(layers)
        assert_formula(layers, x, dys, as_one(layers, x, dys))


@pytest.mark.parametrize(
    "delta, keep, as_one",
    [
        (LORA, Quantized(8, 8), True),
        (Trained(), Quantized(4, 8), True),
        (LORA, Sampled(0.5, min_rows=2), True),  # one sample for all
        (DoRA(r=4, dtype=None), Sampled(0.5, min_rows=2), True),
        (LORA, Sampled(1.0, at="backward"), True),  # all rows
        (Trained(), Sampled(0.5, min_rows=2, at="backward"), False),  # rows of its own
        (LoRA(r=4, dtype=None, lora_dropout=0.5), Exact(), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_what_draws_draws_as_it_does_alone(delta, keep, as_one, frozen):
    """And so does whoever draws next. One that keeps nothing takes a seed, too, and another keeps with its own."""
    layers, (x, _) = three(delta=delta, keep=keep), inputs()
    if frozen is not None:
        layers[frozen].requires_grad_(False)
    dys, found = slopes(layers), []
    for group in (together, lambda layers: contextlib.nullcontext()):
        torch.manual_seed(7)
        at = x.clone().requires_grad_()
        with group(layers):
            ys = [layer(at) for layer in layers]
        if group is together:
            nodes = len({y.grad_fn for y in ys})
            assert nodes == (1 if as_one else 3) if frozen is None else nodes >= 2
        found.append([*ys, *torch.autograd.grad(ys, [at, *trained(layers)], dys), torch.rand(3)])
    assert torch.equal(found[0].pop(), found[1].pop())
    for got, alone in zip(*found, strict=True):
        torch.testing.assert_close(got, alone, rtol=1e-10, atol=1e-12)


def test_among_layers_that_draw_the_others_work_as_one():
    layers, (x, _) = [*three(), made(Dense(), LORA, Sampled(0.5, min_rows=2))], inputs()
    x.requires_grad_()
    with together(layers):
        ys = [layer(x) for layer in layers]
    assert [y.grad_fn is ys[0].grad_fn for y in ys] == [True, True, True, False]


@pytest.mark.parametrize("kind", ["pre", "forward", "backward", "instance"])
def test_who_is_watched_computes_alone(kind):
    layers, (x, _) = three(), inputs()
    x.requires_grad_()
    seen = []
    if kind == "pre":
        layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    elif kind == "forward":
        layers[1].register_forward_hook(lambda module, args, y: seen.append(args[0]))
    elif kind == "backward":
        layers[1].register_full_backward_hook(lambda module, dx, dy: seen.append(dy))
    else:
        layers[1].forward = lambda x: 2 * Linear.forward(layers[1], x)
    right = [layer(x) for layer in layers]
    with together(layers):
        ys = [layer(x) for layer in layers]
    assert ys[0].grad_fn is ys[2].grad_fn is not ys[1].grad_fn
    for got, alone in zip(ys, right, strict=True):
        torch.testing.assert_close(got, alone, rtol=1e-10, atol=1e-12)


def test_weights_that_are_others_for_the_time_of_a_call():
    """As a zeroth-order recipe perturbs them, by hooks of each layer, which address and version do not show."""
    layers, (x, _) = three(), inputs()
    x.requires_grad_()

    def enter(module, args):
        module.clean, module.weight.data = module.weight.data, module.weight.data + 1

    def leave(module, args, y):
        module.weight.data = module.clean

    for layer in layers:
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
    right = [layer(x) for layer in layers]
    with together(layers):
        assert all(torch.equal(layer(x), y) for layer, y in zip(layers, right, strict=True))


def test_layers_that_are_frozen_between_steps():
    layers, (x, _) = three(), inputs()
    for frozen in ((1,), (0, 2), (0, 1, 2), ()):
        for i, layer in enumerate(layers):
            layer.lora_a.requires_grad_(i not in frozen)
            layer.lora_b.requires_grad_(i not in frozen)
        dys = slopes(layers)
        for got, right in zip(*(flat(f(layers, x, dys)) for f in (as_one, one_by_one)), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_a_part_of_an_adapter_that_is_frozen():
    layers, (x, _) = three(), inputs()
    layers[0].lora_a.requires_grad_(False)
    layers[1].lora_b.requires_grad_(False)
    dys = slopes(layers)
    for got, right in zip(*(flat(f(layers, x, dys)) for f in (as_one, one_by_one)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_where_x_needs_no_gradient():
    layers, (x, _) = three(), inputs()
    dys = slopes(layers)
    with together(layers):
        ys = [layer(x) for layer in layers]
    grads = torch.autograd.grad(ys, trained(layers), dys)
    right = torch.autograd.grad([layer(x) for layer in layers], trained(layers), dys)
    for got, alone in zip(grads, right, strict=True):
        torch.testing.assert_close(got, alone, rtol=1e-10, atol=1e-12)
    layers[1].requires_grad_(False)
    with together(layers):
        assert [layer(x).requires_grad for layer in layers] == [True, False, True]


def test_a_weight_that_was_unfrozen_by_hand_is_refused_by_its_own_layer():
    layers, (x, _) = three(), inputs()
    layers[1].weight.requires_grad_()
    with together(layers):
        layers[0](x)
        with pytest.raises(RuntimeError, match="does not train the weight that it adds to"):
            layers[1](x)


def test_another_dtype_is_refused_by_its_own_layer():
    layers, (x, _) = three(), inputs()
    layers[1].float()
    with together(layers):
        layers[0](x)
        with pytest.raises(TypeError, match="cast one of them"):
            layers[1](x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", ["all", "first", "last"])
def test_under_checkpointing(inside, reentrant):
    """Where a part of the layers is called again in backward, they save what they saved before."""
    layers, (x, _) = three(), inputs()
    dys, found = slopes(layers), []
    for grouped in (True, False):
        at = x.clone().requires_grad_()

        def run(at, grouped=grouped):
            with together(layers) if grouped else contextlib.nullcontext():
                if inside == "all":
                    return [layer(at) for layer in layers]
                again = {"first": 0, "last": 2}[inside]
                return [
                    checkpoint(layer, at, use_reentrant=reentrant) if i == again else layer(at)
                    for i, layer in enumerate(layers)
                ]

        ys = checkpoint(lambda at: tuple(run(at)), at, use_reentrant=reentrant) if inside == "all" else run(at)  # noqa: B023
        torch.autograd.backward(ys, dys)
        found.append([*ys, at.grad, *(p.grad for p in trained(layers))])
        for p in trained(layers):
            p.grad = None
    for got, right in zip(*found, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_a_graph_that_is_kept_gives_its_gradients_twice_and_no_second_derivative():
    layers, (x, _) = three(), inputs()
    x.requires_grad_()
    with together(layers):
        y = sum((layer(x) * dy).sum() for layer, dy in zip(layers, slopes(layers), strict=True))
    first = torch.autograd.grad(y, [x, *trained(layers)], retain_graph=True)
    again = torch.autograd.grad(y, [x, *trained(layers)], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match=r"[Ss]econd"):
        torch.autograd.grad(y, x, create_graph=True)


def test_gradients_belong_to_the_caller_and_inputs_are_unchanged():
    layers, (x, _) = three(), inputs()
    dys = slopes(layers)
    before = [t.clone() for t in (x, *dys, *(p for layer in layers for p in layer.parameters()))]
    first = flat(as_one(layers, x, dys))
    for t in first:
        t.zero_()
    for t, kept in zip((x, *dys, *(p for layer in layers for p in layer.parameters())), before, strict=True):
        assert torch.equal(t, kept)


@pytest.mark.parametrize("delta", [LORA, LoRA(r=4), Trained(), NoDelta(), Kronecker()], ids=str)
def test_no_more_is_saved_than_by_layers_alone(delta):
    layers = nn.ModuleList(three(delta=delta))
    x = torch.randn(M, K, dtype=torch.float64, requires_grad=True)

    def run(group):
        with group(layers):
            return [layer(x) for layer in layers]

    as_one, alone = (
        saved_bytes(lambda g=g: run(g), layers) for g in (together, lambda layers: contextlib.nullcontext())
    )
    assert as_one == alone


def test_a_kind_with_a_forward_of_its_own_is_not_computed_as_its_parent():
    class Twice(LoRA):
        def forward(self, c, x):
            y, saved = super().forward(c, x)
            return y.mul_(2), saved

        def backward(self, c, dy, saved, add=None):
            dx, dws, dps = super().backward(c, 2 * dy, saved, add)
            return dx, dws, dps

    layers, (x, _) = three(delta=Twice(r=4, dtype=None)), inputs()
    dys = slopes(layers)
    for got, right in zip(*(flat(f(layers, x, dys)) for f in (as_one, one_by_one)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_a_group_that_another_thread_ends_in_the_middle_of_a_call():
    class Ends:
        def output(self, layer, x):
            return x.new_ones(len(x), layer.out_features)

    class Shared(Linear):
        group = property(lambda self: reads.pop())

    reads = [None, Ends()]  # there at the first look, gone at the second
    layer = Linear.from_linear(nn.Linear(4, 6))
    layer.__class__ = Shared
    assert torch.equal(layer(torch.randn(2, 4)), torch.ones(2, 6)) and reads == [None]
