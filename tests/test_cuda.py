"""What a user does on a GPU, from one layer to a resumed run. Each body takes its device and runs on the CPU as well;
what that device has nothing like (streams, graphs) is then the plain call.

The recipes' promises on a GPU are in tests/methods/test_contract.py, the operators' in tests/ops, the exact layers' in
tests/linear/test_linear.py.
"""

import itertools
from contextlib import contextmanager, nullcontext

import pytest
import torch

import efftune
from efftune import EfftuneError, Linear, use_backend
from efftune.linear import LoRA
from efftune.linear.keep.quantized import Quantized
from tests.budget import assert_within_budget
from tests.devices import devices
from tests.linear.test_linear import BASES, DELTAS, DRAWING, K, M, actual, combines, make
from tests.methods import matrix
from tests.methods.models import batch, llama, loss_fn, prepared
from tests.train import conftest

DEVICES = devices("cpu", "cuda")
RECIPES = [
    "full",
    "lora(r=4)",
    "lora(r=4, lora_dropout=0.1)",
    "int8(group=16) + lora(r=4)",
    "int8(group=16) + peqa",
    "full + mesa(bits=8)",
    "lora(r=4) + wtacrs(ratio=0.5, min_rows=4) + mesa(bits=4)",
    "full + vcas(interval=0, sample_ratio=0.5, row_ratio=0.5)",
    "lora(r=4) + recompute",
    "lora(r=4) + lisa(layers=2, interval=3)",
    "mezo(momentum=0.5, samples=2)",
    "int8(group=16) + peqa + mezo(eps=1e-5)",
    "full + ferret(local_steps=2)",
]


def flat(tensors):
    return torch.cat([t.detach().flatten().double().cpu() for t in tensors])


def trained(tuner):
    return flat(tuner.named_trained().values())


def train(tuner, optimizer, data, count=3):
    """Some steps, whose losses nobody waits for."""
    tuner.model.train()
    for _ in range(count):
        optimizer.zero_grad()
        tuner.backward(data, loss_fn)
        optimizer.step()


def assert_as_near_as_twice(result, first, second, start):
    """`result` has the bits of two runs that have the same; else, since on a GPU some of torch's own sums are in any
    order, it is as near to them as the contract asks of equal draws."""
    if torch.equal(first, second):
        assert torch.equal(result, first)
    else:
        assert (result - first).norm() < 0.05 * (first - start).norm()


# One layer

ESTIMATES = [row for row in itertools.product(BASES, DELTAS, DRAWING) if combines(*row)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("base, delta, keep", ESTIMATES, ids=str)
def test_an_estimate_from_the_same_draws_is_within_budget(base, delta, keep, device):
    """Against float64 with the same seeds, as the reference backends compute it on the CPU."""
    x = torch.randn(3, M // 3, K, generator=torch.Generator().manual_seed(1))

    def estimate(*to):
        layer = make(base, delta, keep).to(*to)
        torch.manual_seed(3)
        return actual(layer, x.to(*to))

    result = estimate(device)
    with use_backend("reference"):
        single, exact = estimate(torch.float32), estimate(torch.float64)
    for got, want, float32 in zip(result, exact, single, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert_within_budget(got.cpu(), want, float32)


# A recipe's steps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast_costs_what_it_costs_the_plain_model(recipe, device):
    """Gradients in bfloat16, with everything exact: their error is at most one and a half that of transformers' own."""

    def error(backward, parameters):
        found = []
        for enabled in (False, True):
            for p in parameters.values():
                p.grad = None
            torch.manual_seed(3)  # LoRA's dropout
            with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
                backward()
            found.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
        exact, rounded = found
        assert exact.keys() == rounded.keys() and all(g.dtype == parameters[n].dtype for n, g in rounded.items())
        exact, rounded = (flat(grads.values()) for grads in found)
        return float((rounded - exact).norm() / exact.norm())

    ids = batch(device=device)
    plain = llama().to(device)
    allowed = error(lambda: loss_fn(plain, ids).backward(), dict(plain.named_parameters()))
    tuner = prepared(llama(), recipe, device)
    optimizer = tuner.optimizer(lr=1e-3)
    with tuner.exactly():
        assert 0 < error(lambda: tuner.backward(ids, loss_fn), tuner.named_trained()) <= 1.5 * allowed
    before = trained(tuner)
    with torch.autocast(device, dtype=torch.bfloat16):
        train(tuner, optimizer, ids)
    assert trained(tuner).isfinite().all() and not torch.equal(trained(tuner), before)


@contextmanager
def beside(device):
    """A stream of one's own, on a GPU."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def everywhere(*names):
    """All recipes on GPUs, and some on the CPU, where nothing but the test itself is tried."""
    return [
        pytest.param(recipe, *device.values, id=f"{recipe}-{device.id}", marks=device.marks)
        for device in devices(*names)
        for recipe in (RECIPES[::4] if device.id == "cpu" else RECIPES)
    ]


def three_steps(recipe, device, context):
    """What trains, before and after."""
    tuner = prepared(llama(), recipe, device)
    start, optimizer, data = trained(tuner), tuner.optimizer(lr=1e-3), batch(device=device)
    torch.manual_seed(7)
    with context:
        train(tuner, optimizer, data)
    assert {p.device for p in tuner.model.parameters()} == {data.device}
    return start, trained(tuner)


@pytest.mark.parametrize("recipe, device", everywhere("cpu", "cuda"))
def test_a_side_stream_gives_the_bits_of_the_default_one(recipe, device):
    (start, first), (_, second) = (three_steps(recipe, device, nullcontext()) for _ in range(2))
    assert_as_near_as_twice(three_steps(recipe, device, beside(device))[1], first, second, start)


@pytest.mark.parametrize("recipe, device", everywhere("cuda:1"))
def test_the_current_device_need_not_be_that_of_the_model(recipe, device):
    (start, first), (_, second) = (three_steps(recipe, device, torch.cuda.device(device)) for _ in range(2))
    assert_as_near_as_twice(three_steps(recipe, device, torch.cuda.device(0))[1], first, second, start)


@pytest.mark.parametrize("recipe", ["lora(r=4, lora_dropout=0.1)", "full + mesa", "mezo(momentum=0.5)"])
def test_a_default_device_is_not_where_seeds_are(recipe):
    """What torch.set_default_device("cuda") does, with a device that has no data."""
    _, plain = three_steps(recipe, "cpu", nullcontext())
    assert torch.equal(three_steps(recipe, "cpu", torch.device("meta"))[1], plain)


# CUDA graphs


def recorded(device, step):
    """What does again what `step` does: on a GPU the replay of a graph of it."""
    if device == "cpu":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["full", "lora(r=4)", "int8(group=16) + lora(r=4)", "int8(group=16) + peqa"])
def test_a_graph_of_a_step_is_the_step(recipe, device):
    """To float32 rounding: under capture cuBLAS chooses other kernels, for a plain torch model as well."""

    def after(make_step):
        tuner = prepared(llama(), recipe, device)
        start = trained(tuner)
        optimizer = tuner.optimizer(lr=1e-3, **({} if device == "cpu" else {"capturable": True}))
        ids = batch(device=device)
        with beside(device):  # kernels are compiled, and the optimizer's state is made, before anything is recorded
            train(tuner, optimizer, ids)
        step = make_step(device, lambda: train(tuner, optimizer, ids, 1))
        for seed in range(1, 4):
            ids.copy_(batch(seed))
            step()
        return start, trained(tuner)

    start, plain = after(lambda device, step: step)
    distance = float((after(recorded)[1] - plain).norm() / (plain - start).norm())
    assert distance == 0 if device == "cpu" else distance < 1e-5


@contextmanager
def capturing(device, monkeypatch):
    if device == "cpu":
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            yield
    else:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            yield


ON_THE_HOST = (
    "mesa", "wtacrs", "lora_dropout", "vcas", "lisa", "recompute", "mezo", "fedkseed", "ferret", "dft", "stagefilter",
    "shira", "lift", "spiel", "saft", "sara", "ltsft", "mft", "ramt",
)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", sorted(r for r in matrix.complete() if any(name in r for name in ON_THE_HOST)))
def test_a_recipe_that_draws_or_counts_on_the_cpu_is_not_captured(recipe, device, monkeypatch):
    tuner = prepared(llama(), recipe, device)
    optimizer, data = tuner.optimizer(lr=1e-3), batch(device=device)
    before = trained(tuner)
    words = "would repeat in every replay what .* on the CPU in this step; capture a recipe without"
    with pytest.raises(EfftuneError, match=words), capturing(device, monkeypatch):
        train(tuner, optimizer, data, 1)
    assert torch.equal(trained(tuner), before)


def test_other_recipes_of_the_contract_have_nothing_to_refuse(monkeypatch):
    for recipe in (r for r in matrix.complete() if not any(name in r for name in ON_THE_HOST)):
        tuner = prepared(llama(), recipe)
        with capturing("cpu", monkeypatch):
            assert tuner.backward(batch(), loss_fn).isfinite()


@pytest.mark.parametrize("kind", [{"delta": LoRA(r=2, lora_dropout=0.5)}, {"keep": Quantized(group=16)}], ids=str)
def test_what_a_layer_made_by_hand_draws_is_not_captured(kind, monkeypatch):
    model = llama()
    tuner = efftune.apply(model, "full")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Linear.from_linear(mlp.up_proj, **kind)
    (name,) = (type(value).__name__ for value in kind.values())
    with capturing("cpu", monkeypatch), pytest.raises(EfftuneError, match=rf"every replay what {name}\("):
        tuner.backward(batch(), loss_fn)


# The trainer

ROUTES = [pytest.param(("cpu", "cpu"), id="cpu")]
if torch.cuda.is_available():
    ROUTES += [
        pytest.param((first, then), id=f"{first}-{then}", marks=pytest.mark.gpu)
        for first, then in (("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu"))
    ]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "recipe, dtype",
    [
        ("full", "mixed"),
        ("lora(r=4, lora_dropout=0.1)", "float32"),
        ("full + mesa", "mixed"),
        ("vcas(interval=2)", "mixed"),
        ("mezo", "float32"),
    ],
)
def test_a_resumed_run_ends_as_an_unbroken_one(recipe, dtype, route, tmp_path):
    """The checkpoint may be another device's. On the CPU bit for bit; on a GPU, where some of torch's own sums are in
    any order, as near as in the contract's test of equal draws."""

    def run(name, device, resumed=False, stop=None):
        model = conftest.llama().to(device)
        t = conftest.trainer(recipe, run=tmp_path / name, model=model, dtype=dtype, resumed=resumed)

        def look(record):
            if record["step"] == stop:
                raise KeyboardInterrupt

        t.on_step, start = look, trained(t.tuner)
        if stop is None:
            t.fit()
        else:
            with pytest.raises(KeyboardInterrupt):
                t.fit()
        assert {p.device.type for p in t.model.parameters()} == {device} and t.step == (stop or 8)
        return start, trained(t.tuner)

    first, then = route
    start, straight = run("straight", first)
    run("broken", first, stop=5)  # two steps after the checkpoint
    _, resumed = run("broken", then, resumed=True)
    if route == ("cpu", "cpu"):
        assert torch.equal(straight, resumed)
    else:
        assert (straight - resumed).norm() < 0.05 * (straight - start).norm()
