"""The two ways to a backend: directly, and through torch's dispatcher wherever somebody stands in between."""

import threading

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import efftune
from efftune.ops._op import _direct, use_backend
from efftune.ops.draw_seed import draw_seed
from efftune.ops.glu import glu, glu_backward, glu_op
from efftune.ops.rms_norm import rms_norm

GLU = torch.ops.efftune.glu.default


@pytest.fixture
def dispatched(monkeypatch):
    """The calls that go through the dispatcher."""
    seen = []
    overload = glu_op.overload

    def counted(*args):
        seen.append(args)
        return overload(*args)

    monkeypatch.setattr(glu_op, "overload", counted)
    return seen


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Tagged(Tensor):
    """A subclass that looks on."""

    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is GLU:
            cls.seen += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def x(seed=0):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))


def test_plain_tensors_go_directly(dispatched):
    expected = glu_op.overload(x(), x(1), "silu")
    dispatched.clear()
    assert torch.equal(glu(x(), x(1), "silu"), expected)
    leaf = torch.nn.Parameter(x())
    with torch.no_grad():
        assert torch.equal(glu(leaf, x(1), "silu"), expected)
    with torch.inference_mode():
        assert torch.equal(glu(x(), x(1), "silu"), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(glu(x(), x(1), "silu"), expected)
    assert dispatched == []


def test_in_another_thread_too(dispatched):
    results = []
    thread = threading.Thread(target=lambda: results.append(glu(x(), None, "silu")))
    thread.start()
    thread.join()
    assert len(results) == 1 and dispatched == []


def test_a_layer_s_functions_go_directly(dispatched):
    gate, up = x().requires_grad_(), x(1).requires_grad_()
    y = efftune.nn.glu.glu(gate, up, "silu")
    y.sum().backward()
    assert dispatched == [] and gate.grad is not None


def test_use_backend_is_obeyed_on_both_ways():
    for call in (glu_op, glu_op.overload):
        with use_backend("cpp"), pytest.raises(RuntimeError, match="float64 is computed by the reference"):
            call(x().double(), None, "silu")
        with use_backend("nothing"), pytest.raises(RuntimeError, match="has no backend 'nothing'"):
            call(x(), None, "silu")


def test_what_requires_grad_is_left_to_autograd(dispatched):
    y = glu(x().requires_grad_(), None, "silu")
    assert len(dispatched) == 1
    assert y.requires_grad == torch.ops.efftune.glu(x().requires_grad_(), None, "silu").requires_grad


def test_dispatch_modes_see_operators():
    given, gate = x(), x().requires_grad_()
    with Calls() as calls:
        glu(given, None, "silu")
    assert calls.seen == [GLU]
    with Calls() as calls:
        efftune.nn.glu.glu(gate, None, "silu").sum().backward()
    assert GLU in calls.seen and torch.ops.efftune.glu_backward.default in calls.seen


def test_a_seed_is_the_same_on_both_ways():
    torch.manual_seed(3)
    directly = draw_seed()
    torch.manual_seed(3)
    with Calls() as calls:
        seen = draw_seed()
    assert torch.ops.efftune.draw_seed.default in calls.seen and torch.equal(directly, seen)


def test_function_modes_see_operators():
    with Functions() as functions:
        glu(x(), None, "silu")
    assert GLU in functions.seen


def test_the_profiler_names_operators():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        glu(x(), None, "silu")
    assert "efftune::glu" in [event.key for event in profile.key_averages()]


def test_subclasses_see_operators():
    Tagged.seen = 0
    y = glu(x().as_subclass(Tagged), None, "silu")
    assert type(y) is Tagged and Tagged.seen == 1


def test_meta_and_fake_tensors_run_no_kernel():
    y, mean, rstd = rms_norm(torch.empty(5, 6, device="meta"))
    assert y.is_meta and y.shape == (5, 6) and mean is None and rstd.is_meta and rstd.shape == (5,)
    with torch._subclasses.FakeTensorMode() as mode:
        y = glu(mode.from_tensor(x()), None, "silu")
    assert isinstance(y, torch._subclasses.FakeTensor) and y.shape == (5, 6)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_records_operators(pre_dispatch):
    graph = make_fx(lambda a: glu(a, None, "silu") + 1, pre_dispatch=pre_dispatch)(x())
    assert GLU in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(x(1)), glu(x(1), None, "silu") + 1)


def test_jit_trace_records_operators():
    traced = torch.jit.trace(lambda a: glu(a, None, "silu") + 1, (x(),), check_trace=False)
    assert torch.equal(traced(x(1)), glu(x(1), None, "silu") + 1)


def test_torch_compile_and_export_record_operators():
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    compiled = torch.compile(lambda a: glu(a, None, "silu") + 1, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x()), glu(x(), None, "silu") + 1)
    assert GLU in graphs[0]

    class Module(torch.nn.Module):
        def forward(self, a):
            return glu(a, None, "silu") + 1

    for strict in (False, True):
        program = torch.export.export(Module(), (x(),), strict=strict)
        assert GLU in [node.target for node in program.graph.nodes]


def test_transforms_do_what_the_dispatcher_does(dispatched):
    stacked = torch.func.vmap(lambda a: glu(a, None, "silu"))(torch.stack([x(), x(1)]))
    functional = torch.func.functionalize(lambda a: glu(a, None, "silu"))(x())
    assert len(dispatched) == 2
    assert torch.equal(stacked, torch.stack([glu(x(), None, "silu"), glu(x(1), None, "silu")]))
    assert torch.equal(functional, glu(x(), None, "silu"))


def test_what_a_pointer_does_not_tell_is_made_real_first():
    # A negated view and a zero without memory: their data is not what their pointer leads to.
    negative, zero = torch._neg_view(x()), torch._efficientzerotensor((5, 6))
    assert torch.equal(glu(negative, None, "silu"), glu(-x(), None, "silu"))
    assert torch.equal(glu(x(), zero, "silu"), torch.zeros(5, 6))
    assert torch.equal(glu_backward(zero, x(), None, "silu")[0], torch.zeros(5, 6))


def test_arguments_of_another_kind_are_left_to_the_schema(dispatched):
    with pytest.raises(RuntimeError, match="glu"):
        glu_op(x(), None, object())
    assert len(dispatched) == 1
    assert not _direct((x(), (1, 2))) and not _direct((x(), ["a"])) and _direct((x(), [1, 2], None, 0.5, "a", True))
    assert not _direct((x(), [None])) and not _direct((x(), [[x()]])) and _direct((x(), [1.0], [x(), x(1)], []))
    assert not _direct((x(), [x(), x(1).requires_grad_()])) and not _direct((x(), [torch._neg_view(x())]))
