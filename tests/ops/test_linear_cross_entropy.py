"""linear_cross_entropy against the naive formula in float64: every setting, every tile, no logits of all tokens."""

import math

import pytest
import torch
import torch.nn.functional as F

import efftune.ops.linear_cross_entropy as module
from bench.harness import peak_bytes
from efftune import use_backend
from efftune.ops._available import why_not
from efftune.ops.linear_cross_entropy import BACKWARD, FORWARD, linear_cross_entropy
from tests.budget import assert_within_budget, rms

BACKENDS = ["reference", "cpp", "triton"]
SHAPES = [(1, 8, 16), (7, 13, 11), (37, 24, 1301), (5, 4096, 33), (3, 16, 5000)]  # M, K, V


@pytest.fixture(autouse=True)
def _interpreted(request):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("backend") == "triton" and why_not("triton", torch.empty(0)) is not None:
        pytest.skip("Triton is not interpreted in this process")


@pytest.fixture
def small_tiles(monkeypatch):
    take_small_tiles(monkeypatch)


def take_small_tiles(monkeypatch):
    """Several tiles of tokens, of the vocabulary, and of widened weights, none of them all of one size."""
    monkeypatch.setattr(module, "_tokens", lambda m, vocabulary, device: 5)
    monkeypatch.setattr(module, "_columns", lambda m, vocabulary, device: min(vocabulary, 300))
    monkeypatch.setattr(module, "BLOCK", 24 * 500)


def operands(shape, dtype, bias=True, seed=0):
    m, k, v = shape
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(m, k, generator=g), 3 * torch.randn(v, k, generator=g) / k**0.5
    targets = torch.randint(v, (m,), generator=g)
    targets[m // 2 :: 3] = -100
    made = [hidden.to(dtype), weight.to(dtype), torch.randn(v, generator=g).to(dtype) if bias else None]
    # Powers of two: multiplying the rounded gradient of hidden by them rounds nothing.
    return made, targets, (torch.randint(-3, 4, (m,), generator=g).exp2() * (torch.rand(m, generator=g) - 0.5).sign())


def naive(hidden, weight, bias, targets, **settings):
    return losses(F.linear(hidden, weight, bias), targets, **settings)


def losses(z, targets, softcap=None, label_smoothing=0.0):
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, targets, label_smoothing=label_smoothing, reduction="none")


def ours(hidden, weight, bias, targets, **settings):
    return linear_cross_entropy(hidden, weight, targets, bias, reduction="none", **settings)


def run(function, dtype, made, targets, dy, **settings):
    """Loss of each token and the gradients for any upstream dy."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in made]
    loss = function(*leaves, targets, **settings)
    loss.backward(dy.to(loss.dtype))
    return [loss.detach(), *(t.grad for t in leaves if t is not None)]


def with_rounded_gradient(dtype, made, targets, dy, **settings):
    """run(naive, torch.float64), but the gradient of the logits is rounded to dtype, once, before its products."""
    hidden, weight, bias = (t.double() for t in made)
    z = F.linear(hidden, weight, bias).requires_grad_()
    loss = losses(z, targets, **settings)
    dz = torch.autograd.grad(loss.sum(), z)[0]
    without, dz = (d.to(dtype).double() for d in (dz, dz * dy.double()[:, None]))
    return [loss.detach(), (without @ weight) * dy.double()[:, None], dz.t() @ hidden, dz.sum(0)]


def check(backend, dtype, made, targets, dy, **settings):
    with use_backend(backend):
        results = run(ours, dtype, made, targets, dy, **settings)
    exact, single = (run(naive, wide, made, targets, dy, **settings) for wide in (torch.float64, torch.float32))
    assert results[0].dtype == torch.promote_types(dtype, torch.float32)
    assert [r.dtype for r in results[1:]] == [dtype] * len(results[1:])
    for result, oracle, float32 in zip(results, exact, single, strict=True):
        assert_within_budget(result, oracle, float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_within_budget(backend, dtype, shape):
    made, targets, dy = operands(shape, dtype, bias=shape[0] != 7)
    check(backend, dtype, made, targets, dy)


@pytest.mark.parametrize("softcap", [None, 1.5, 30.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_settings_within_budget(small_tiles, backend, dtype, label_smoothing, softcap):
    made, targets, dy = operands((37 if backend != "triton" else 7, 24, 1301), dtype)
    check(backend, dtype, made, targets, dy, softcap=softcap, label_smoothing=label_smoothing)


@pytest.mark.parametrize("softcap", [None, 1.5, 20.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, (37, 24, 1301)])
def test_the_gradient_of_logits_is_rounded_once_on_a_gpu(monkeypatch, small_tiles, shape, label_smoothing, softcap):
    """What a GPU computes, by the reference: bfloat16 operands, float32 logits, their gradient in bfloat16."""
    monkeypatch.setattr(module, "_widened", lambda *args: False)
    monkeypatch.setattr(module, "_rounds_gradient", lambda device: True)
    monkeypatch.setattr(module, "_aligned", lambda x, vocabulary: vocabulary // 16 * 16)
    made, targets, dy = operands(shape, torch.bfloat16)
    settings = dict(softcap=softcap, label_smoothing=label_smoothing)
    with use_backend("reference"):
        results = run(ours, torch.bfloat16, made, targets, dy, **settings)
    exact, single = (run(naive, w, made, targets, dy, **settings) for w in (torch.float64, torch.float32))
    rounded = with_rounded_gradient(torch.bfloat16, made, targets, dy, **settings)
    assert torch.equal(rounded[0], exact[0])
    for result, oracle, float32, other in zip(results, exact, single, rounded, strict=True):
        assert_within_budget(result, oracle, float32, other)


@pytest.mark.parametrize("label_smoothing, softcap", [(0.0, None), (0.1, 1.5)])
@pytest.mark.parametrize("vocabulary", [1301, 1312])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_of_logits_as_far_apart_as_on_a_gpu(
    monkeypatch, small_tiles, backend, vocabulary, label_smoothing, softcap
):
    """What lies between two rows, NaN here, is neither a logit nor a gradient."""
    gpu = torch.device("cuda")
    assert [module._stride(n, gpu) for n in (1, 16, 50257)] == [16, 16, 50272]
    stride = module._stride
    monkeypatch.setattr(module, "_stride", lambda cols, device: stride(cols, gpu) + 16)
    new_empty = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    made, targets, dy = operands((7, 24, vocabulary), torch.float32)
    check(backend, torch.float32, made, targets, dy, softcap=softcap, label_smoothing=label_smoothing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_hidden_is_rounded_twice(dtype):
    made, targets, _ = operands((37, 24, 1301), dtype)
    dy = torch.randn(37)
    got = run(ours, dtype, made, targets, dy)[1].double()
    exact = run(naive, torch.float64, made, targets, dy)[1]
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (
        (got - exact).abs() <= 1.01 * torch.finfo(dtype).eps * exact.abs() + 1e-5 * exact.abs().max() + smallest
    ).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_and_extreme_logits(backend):
    """p - 1 of a token that is nearly certain, exp far below its range, logits near the largest float."""
    hidden = torch.eye(4)
    weight = torch.zeros(50, 4)
    weight[3] = torch.tensor([20.0, 200.0, 3e38, -1e4])
    weight[4, 3] = 12.0
    targets, dy = torch.tensor([3, 3, 3, 4]), torch.ones(4)
    with use_backend(backend):
        loss, _, dw = run(ours, torch.float32, (hidden, weight, None), targets, dy)
    expected, _, exact_dw = run(naive, torch.float64, (hidden, weight, None), targets, dy)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(dw.double(), exact_dw, rtol=1e-6, atol=2e-6)


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, under the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_are_not_hidden(backend):
    hidden = torch.tensor([[torch.nan], [torch.inf], [0.0]])
    weight = torch.zeros(7, 1)
    weight[2] = 1.0
    with use_backend(backend):
        loss = ours(hidden, weight, None, torch.tensor([0, 0, 0]))
    assert loss[:2].isnan().all() and loss[2] == pytest.approx(math.log(7))


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_a_few_tokens_are_summed_as_precisely_as_many(tokens):
    """A large term among small ones, as at the target: added to it one by one, each small one is rounded."""
    g = torch.Generator().manual_seed(0)
    dz, weight = 1e-3 * torch.randn(32, 32003, generator=g), torch.randn(32003, 24, generator=g)
    dz[:, 11000] -= 0.9
    oracle, many = dz.double() @ weight.double(), dz @ weight
    got = module._times(dz[:tokens], weight, torch.float32, torch.float32)
    assert_within_budget(got, oracle[:tokens], many[:tokens])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_of_the_softmax_is_shifted(backend):
    """The rounding of the logarithm of a sum, about 10 here, would move all elements of a row by up to 2^-21."""
    z = 0.1 * torch.randn(16, 32768, generator=torch.Generator().manual_seed(0))
    loss, norm, dz = torch.empty(16), torch.empty(2, 16), z.clone()
    tile = getattr(module, f"_{'torch' if backend == 'reference' else backend}_tile")
    tile(dz, None, torch.zeros(16, dtype=torch.int64), norm, loss, None, dz, 0, 32768, -100, 0.0, 0.0)
    assert rms(dz.double().sum(1)) <= 2**-23


def test_gradcheck():
    made, targets, _ = operands((5, 4, 9), torch.float64)
    made = [t.requires_grad_() for t in made]
    for settings in ({}, {"softcap": 2.0, "label_smoothing": 0.2}):
        assert torch.autograd.gradcheck(lambda h, w, b, s=settings: ours(h, w, b, targets, **s), made)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_equal_torch(reduction):
    (hidden, weight, bias), targets, _ = operands((2 * 3 * 4, 13, 31), torch.float32)
    hidden, targets = hidden.view(2, 3, 4, 13), targets.view(2, 3, 4)
    loss = linear_cross_entropy(hidden, weight, targets, bias, reduction=reduction, label_smoothing=0.1)
    expected = F.cross_entropy(
        F.linear(hidden, weight, bias).flatten(0, 2), targets.flatten(), reduction=reduction, label_smoothing=0.1
    )
    torch.testing.assert_close(loss, expected.view(loss.shape))


def test_num_items_and_token_weights():
    (hidden, weight, _), targets, w = operands((12, 13, 31), torch.float32)
    w.requires_grad_()
    terms = F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    for items in (50, torch.tensor(50)):
        loss = linear_cross_entropy(hidden, weight, targets, num_items=items)
        torch.testing.assert_close(loss, terms.sum() / 50)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, token_weights=w)
    torch.testing.assert_close(loss, (terms * w).sum() / (targets != -100).sum())
    loss.backward()
    expected = torch.autograd.grad(
        (naive(hidden, weight, None, targets) * w.detach()).sum() / (targets != -100).sum(), hidden
    )[0]
    torch.testing.assert_close(hidden.grad, expected)
    assert w.grad is None
    other = linear_cross_entropy(hidden, weight, targets.where(targets >= 0, 1000), ignore_index=1000)
    torch.testing.assert_close(other, terms.sum() / (targets != -100).sum())


def test_nothing_counted():
    (hidden, weight, _), targets, _ = operands((6, 13, 31), torch.float32)
    hidden, targets = hidden.requires_grad_(), torch.full_like(targets, -100)
    assert F.cross_entropy(hidden @ weight.t(), targets).isnan()
    assert linear_cross_entropy(hidden, weight, targets).isnan()
    loss = linear_cross_entropy(hidden, weight, targets, num_items=3)
    loss.backward()
    assert loss == 0 and hidden.grad.abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    (hidden, weight, bias), targets, dy = operands((6, 13, 31), torch.float32)
    with use_backend(backend):
        loss, *grads = run(ours, torch.float32, (hidden[:0], weight, bias), targets[:0], dy[:0])
    assert loss.shape == (0,) and grads[0].shape == (0, 13)
    assert all(g.abs().max() == 0 for g in grads[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_inputs_unchanged(backend):
    (hidden, weight, bias), targets, dy = operands((12, 16, 34), torch.float32)
    strided = [hidden.t().contiguous().t(), weight.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0]]
    apart = torch.stack([targets, targets], 1)[:, 0]
    before = [t.clone() for t in (*strided, apart)]
    with use_backend(backend):
        expected = run(ours, torch.float32, (hidden, weight, bias), targets, dy)
        leaves = [t.requires_grad_() for t in strided]
        loss = ours(*leaves, apart)
        loss.backward(dy.sum().expand(12))
        again = run(ours, torch.float32, (hidden, weight, bias), targets, dy.sum().expand(12))
    torch.testing.assert_close(loss.detach(), expected[0])
    for leaf, g in zip(leaves, again[1:], strict=True):
        torch.testing.assert_close(leaf.grad, g)
    assert all(torch.equal(a, b) for a, b in zip((*strided, apart), before, strict=True))


def test_gradients_accumulate_and_backward_repeats():
    (hidden, weight, _), targets, _ = operands((12, 13, 31), torch.float32, bias=False)
    count = int((targets != -100).sum())
    whole, parts = (weight.clone().requires_grad_() for _ in range(2))
    loss = linear_cross_entropy(hidden, whole, targets)
    loss.backward(retain_graph=True)
    once = whole.grad.clone()
    loss.backward()
    torch.testing.assert_close(whole.grad, 2 * once)
    for i in range(4):
        rows = slice(3 * i, 3 * i + 3)
        (linear_cross_entropy(hidden[rows], parts, targets[rows], num_items=4 * count) * 4).backward()
    torch.testing.assert_close(parts.grad, once)


def test_the_loss_may_be_scaled_combined_and_dropped():
    (hidden, weight, _), targets, _ = operands((12, 13, 31), torch.float32, bias=False)
    results = []
    for function in (linear_cross_entropy, lambda h, w, t: F.cross_entropy(h @ w.t(), t)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        function(h, w, targets)  # nobody asks for its gradient
        a, b = function(h, w, targets), function(2 * h, w, targets)
        (3 * a + a * b).backward()
        results.append((h.grad, w.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_sixteen_bit_sums_would_be_seen():
    """The gradient of a column that every token shares: 4096 equal terms, which a bfloat16 sum would lose."""
    hidden, weight = torch.ones(4096, 8, dtype=torch.bfloat16), torch.zeros(16, 8, dtype=torch.bfloat16)
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64), reduction="sum").backward()
    assert torch.equal(weight.grad[1], torch.full((8,), 4096 / 16, dtype=torch.bfloat16))


def test_what_is_frozen_costs_nothing(monkeypatch):
    (hidden, weight, bias), targets, _ = operands((12, 13, 31), torch.float32)
    calls = []
    monkeypatch.setattr(module, "BACKWARD", lambda *args: calls.append(args[-2:]) or BACKWARD(*args))
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets, bias).backward()
    assert calls == [] and hidden.grad is not None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, targets, bias)
    assert [s for s in saved if len(s)] == [(12, 13)]
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight.clone().requires_grad_(), targets).requires_grad
    for frozen in range(3):
        made = [t.detach().clone().requires_grad_(i != frozen) for i, t in enumerate((hidden, weight, bias))]
        linear_cross_entropy(made[0], made[1], targets, made[2]).backward()
        assert [t.grad is None for t in made] == [i == frozen for i in range(3)]
    assert calls == [(True, True), (False, True), (True, False)]


@pytest.mark.parametrize("trains", [True, False])
def test_peak_memory(monkeypatch, trains):
    """Above dW: a sixteenth of what the naive way in bfloat16 takes, with tiles of a sixteenth. (By itself it does not
    make small tiles smaller.)"""
    m, k, v = 512, 32, 32768
    cpu = torch.device("cpu")
    assert module._tokens(4096, 131072, cpu) == 256 and module._columns(4096, 131072, cpu) == 2048
    monkeypatch.setattr(module, "_tokens", lambda m, vocabulary, device: m // 16)
    monkeypatch.setattr(module, "_columns", lambda m, vocabulary, device: vocabulary // 16)
    monkeypatch.setattr(module, "BLOCK", 2**15)
    hidden = torch.randn(m, k).bfloat16().requires_grad_()
    weight = torch.randn(v, k).bfloat16().requires_grad_(trains)
    targets = torch.randint(v, (m,))

    def extra(loss):
        def call():
            loss().backward()
            hidden.grad = weight.grad = None

        return peak_bytes(call, "cpu") - (weight.nbytes if trains else 0)

    plain = extra(lambda: F.cross_entropy(F.linear(hidden, weight).float(), targets))
    assert extra(lambda: linear_cross_entropy(hidden, weight, targets)) <= plain / 16


def test_autocast():
    (hidden, weight, bias), targets, dy = operands((12, 13, 31), torch.float32)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(*leaves, targets)
        loss.backward(dy)  # inside: the products of backward are not autocast a second time
    assert loss.dtype == torch.float32 and all(t.grad.dtype == torch.float32 for t in leaves)
    rounded = [hidden.detach().bfloat16().float(), weight.detach(), bias.detach()]
    expected = run(ours, torch.float32, rounded, targets, dy)
    torch.testing.assert_close(loss.detach(), expected[0], rtol=2e-2, atol=2e-2)
    for leaf, g in zip(leaves, expected[1:], strict=True):
        assert (leaf.grad - g).norm() <= 0.02 * g.norm()


H, W, T = torch.randn(4, 8), torch.randn(9, 8), torch.tensor([0, 1, 2, 8])


@pytest.mark.parametrize(
    "args, settings, sentence",
    [
        ((H, W, T), {"reduction": "avg"}, "'mean', 'sum' or 'none', not 'avg'"),
        ((H.long(), W, T), {}, "hidden in float64"),
        ((H, W.t(), T), {}, r"\(4, 8\) and \(8, 9\)"),
        ((H, W, T[:3]), {}, r"targets of shape \(4,\)"),
        ((H, W, T.int()), {}, "int64"),
        ((H, W, T, torch.zeros(8)), {}, r"bias \(9,\)"),
        ((H, W, torch.tensor([0, 1, 9, 2])), {}, "0..8 or ignore_index=-100, not 9"),
        ((H, W, torch.tensor([0, -1, 3, 2])), {}, "not -1"),
        ((H, W.bfloat16(), T), {}, "one dtype"),
        ((H, W, T), {"token_weights": torch.ones(3)}, "one token weight per target"),
        ((H, W, T), {"label_smoothing": 1.5}, r"label_smoothing in \[0, 1\]"),
        ((H, W, T), {"softcap": 0.0}, "positive softcap"),
        ((H, W, T), {"reduction": "sum", "num_items": 3}, "num_items for reduction='mean'"),
    ],
)
def test_errors_name_the_remedy(args, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        linear_cross_entropy(*args, **settings)


def test_a_target_outside_is_nan_where_it_is_not_looked_at():
    """What a GPU does: neither clamped nor trained on."""
    for tile in (module._torch_tile, module._triton_tile):
        if tile is module._triton_tile and why_not("triton", torch.empty(0)) is not None:
            continue
        z, loss, norm = torch.randn(3, 9), torch.empty(3), torch.empty(2, 3)
        dz = torch.empty_like(z)
        tile(z, None, torch.tensor([0, 9, -1]), norm, loss, None, dz, 0, 9, -100, 0.0, 0.0)
        assert loss.isnan().tolist() == [False, True, True]
        assert dz.isnan().all(1).tolist() == [False, True, True]


def test_forced_backend_gives_its_reason():
    made, targets, _ = operands((4, 8, 9), torch.float64)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="float64 is computed by the reference"):
        ours(*made, targets)


def test_no_second_derivative():
    (hidden, weight, _), targets, _ = operands((4, 8, 9), torch.float32, bias=False)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    made, targets, dy = operands((7, 13, 31), dtype)
    arguments = (*made, targets, -100, 0.1, None)
    torch.library.opcheck(FORWARD.overload, (*arguments, True))
    torch.library.opcheck(FORWARD.overload, (*made[:2], None, targets, -100, 0.0, 2.0, False))
    norm = FORWARD(*arguments, False)[1]
    torch.library.opcheck(BACKWARD.overload, (dy, *made, targets, norm, -100, 0.1, None, True, True))
    torch.library.opcheck(BACKWARD.overload, (dy, *made[:2], None, targets, norm, -100, 0.1, None, True, False))


def test_compile():
    torch._dynamo.reset()
    (hidden, weight, bias), targets, _ = operands((12, 13, 31), torch.float32)

    def step(h, w, b):
        return linear_cross_entropy(h * 2, w, targets, b, softcap=5.0, label_smoothing=0.1, token_weights=h[:, 0])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, step):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        loss = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def with_the_product_of_a_gpu(made, targets, dy, **settings):
    """run(naive, torch.float32) from logits that are the GPU's own product of 16-bit operands with float32 results: its
    tensor cores truncate terms where a CPU's sum rounds. In the same parts, since kernels differ in their order."""
    hidden, weight, bias = made
    z = torch.empty(len(hidden), module._stride(len(weight), hidden.device), device=hidden.device)[:, : len(weight)]
    module._logits(hidden, weight, hidden.dtype, z)
    z = (z + bias.float()).requires_grad_()
    loss = losses(z, targets, **settings)
    dz = torch.autograd.grad(loss, z, dy)[0]
    return [t.cpu() for t in (loss.detach(), dz @ weight.float(), dz.t() @ hidden.float(), dz.sum(0))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 777, 5003), (4096, 1024, 32000)])
def test_on_a_gpu(shape, dtype, monkeypatch):
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        monkeypatch.setattr(torch.backends.cuda.matmul, name, False)
    made, targets, dy = operands(shape, dtype)
    on_gpu = [t.cuda() for t in made], targets.cuda(), dy.cuda()
    settings = dict(softcap=20.0, label_smoothing=0.1)
    exact, rounded = run(naive, torch.float64, made, targets, dy, **settings), [None] * 4
    if dtype == torch.float32:
        single = run(naive, dtype, made, targets, dy, **settings)
    else:
        rounded = with_rounded_gradient(dtype, made, targets, dy, **settings)
        single = with_the_product_of_a_gpu(*on_gpu, **settings)
        assert rms(single[0] - exact[0]) <= 2**-17 * rms(exact[0])
    for backend in ("triton", "reference"):
        with use_backend(backend):
            results = run(ours, dtype, *on_gpu, **settings)
        for result, oracle, float32, other in zip(results, exact, single, rounded, strict=True):
            assert_within_budget(result.cpu(), oracle, float32, other)
