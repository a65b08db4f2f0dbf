"""A recipe that cannot be applied is refused before the model is touched, whatever of it fails and in which layer."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.linear import Dense, Int8, Linear, LoRA
from efftune.linear.contracts import Base, Delta
from efftune.methods._base import STORES, TRAINS, Method
from efftune.recipe import parse
from tests.linear.toys import Adopting, EightBits, RowWise
from tests.methods.models import Perceptron, llama

MARK = 7.0  # in the corner of a weight: the layer that fails


def marked(model, name="layers.2"):
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = MARK
    return model


def fail(weight, error):
    if weight[0, 0] == MARK:
        raise error


def state(model):
    """Everything that a half-applied recipe would have changed: modules, tensors, their bits, flags, and the draws."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {n: (id(t), t._version, t.requires_grad, t.dtype, t.layout) for n, t in named.items()}
    modules = [(n, id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()]
    bits = {n: t.to_dense().contiguous().view(torch.uint8).tolist() for n, t in named.items() if not lazy(t)}
    return modules, tensors, bits, torch.get_rng_state().tolist()


def lazy(tensor):
    return isinstance(tensor, nn.UninitializedParameter)


def refused(model, recipe, *says):
    for p in list(model.parameters())[::2]:
        if not lazy(p):
            p.requires_grad_(False)
    before = state(model)
    with pytest.raises(EfftuneError) as caught:
        efftune.apply(model, recipe)
    assert state(model) == before
    for text in says:
        assert text in str(caught.value)


@dataclass(frozen=True)
class BadStore(Dense):
    error: type = ValueError

    def store(self, weight):
        fail(weight, self.error("no place for it"))
        return (weight.clone(),)

    def adopt(self, module):
        return None  # what a layer has is not stored yet


@dataclass(frozen=True)
class BadBegin(LoRA):
    error: type = ValueError

    def begin(self, weight):
        fail(weight, self.error("no place for it"))
        return weight, self.init(tuple(weight.shape), weight.dtype, weight.device)


@dataclass(frozen=True)
class BadInit(LoRA):
    error: type = ValueError

    def init(self, shape, dtype, device):
        if shape == (9, 8):
            raise self.error("no place for it")
        return super().init(shape, dtype, device)


@dataclass(frozen=True)
class Aliased(Delta):
    """Writes into W what is a part of W: refused where the layer is made."""

    names = ("part",)

    def begin(self, weight):
        return weight, (weight[0] if weight[0, 0] == MARK else weight[0].clone(),)

    def put(self, c):
        pass


@dataclass(frozen=True)
class Stores(Method):
    base: Base
    target_modules: str | tuple[str, ...] = "all-linear"

    name = "stores"
    phase = STORES

    def plan(self, plan):
        plan.wish(self, plan.targets(self, self.target_modules, self.base), base=self.base)


@dataclass(frozen=True)
class Adapts(Method):
    delta: Delta

    name = "adapts"
    phase = TRAINS

    def plan(self, plan):
        plan.wish(self, plan.targets(self, "all-linear"), delta=self.delta)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError])
@pytest.mark.parametrize(
    "make",
    [
        lambda e: [Stores(BadStore(error=e)), *parse("lora(r=2)")],
        lambda e: [Stores(BadStore(error=e)), Adapts(BadBegin(r=2))],
        lambda e: [Adapts(BadBegin(r=2, error=e))],
        lambda e: [*parse("int8"), Adapts(BadBegin(r=2, error=e))],
    ],
    ids=["store", "store of a begin", "begin", "begin over int8"],
)
def test_what_a_base_or_a_delta_raises_at_the_third_layer_leaves_the_model_as_it_was(make, error):
    refused(marked(Perceptron(4)), make(error), "layers.2: ", "no place for it")


def test_so_does_what_init_raises_and_a_delta_that_is_a_part_of_the_weight():
    model = Perceptron(3)
    model.layers[2] = nn.Linear(8, 9)
    refused(model, [Adapts(BadInit(r=2, error=RuntimeError))], "layers.2: ", "no place for it", "give adapts target_")
    refused(marked(Perceptron(4)), [Adapts(Aliased())], "layers.2: part of Aliased() shares memory with the weight")


def test_a_layer_that_is_efftunes_own_already():
    model = efftune.apply(marked(Perceptron(3)), "lora(r=2, target_modules='layers.0')").model
    model.requires_grad_(False)
    refused(model, [Stores(BadStore()), *parse("lora(r=2)")], "layers.2: no place for it")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(value):
    model = llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] = value
    refused(
        model, "int8 + lora(r=4)", "model.layers.2.mlp.down_proj: int8_quantize takes finite weights", "check where"
    )


def parameter(data):
    return nn.Parameter(data, requires_grad=False)


KINDS = {
    "integers": (lambda w: w.to(torch.int8), "int8 with 2 dimensions"),
    "complex": (lambda w: w.to(torch.complex64), "complex64 with 2"),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "float8_e4m3fn with 2"),
    "sparse": (lambda w: w.to_sparse(), "float32, sparse_coo with 2"),
    "three dimensions": (lambda w: w[None], "float32 with 3"),
}


@pytest.mark.parametrize("recipe", ["lora(r=4)", "int8 + lora(r=4)", "dora(r=4)", "hira(r=4)"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_no_dense_matrix(kind, recipe):
    model, (make, said) = Perceptron(4), KINDS[kind]
    model.layers[2].weight = parameter(make(model.layers[2].weight.detach()))
    by = " and ".join(m.name for m in parse(recipe))
    refused(
        model, recipe, f"layers.2: {by} works with a dense weight (N, K) in float32", said, "target_modules without"
    )
    efftune.apply(model, "lora(r=4, target_modules='layers.0')")  # where it is not meant, it is no hindrance
    with pytest.raises(EfftuneError, match="with a dense weight in float32, .* not this Linear; give a base for it"):
        Linear.from_linear(model.layers[2], delta=LoRA(r=4))


@pytest.mark.parametrize("kind", KINDS)
def test_full_trains_what_is_dense_and_refuses_other_floats(kind):
    model = Perceptron(4)
    model.layers[2].weight = parameter(KINDS[kind][0](model.layers[2].weight.detach()))
    if kind in ("float8", "sparse"):
        refused(model, "full", "layers.2.weight: full cannot train", "give it target_modules without")
    else:
        trained = efftune.apply(model, "full").named_trained()
        assert ("layers.2.weight" in trained) == (kind == "three dimensions") and "layers.1.weight" in trained


@pytest.mark.parametrize("recipe", ["lora(r=2)", "full", "int8 + lora(r=2)", "mezo"])
def test_a_layer_without_a_shape(recipe):
    model = nn.Sequential(nn.Linear(4, 8), nn.LazyLinear(3))
    refused(model, recipe, "1.weight has no shape until the model is called", "call it once")
    model(torch.randn(2, 4))
    efftune.apply(model, recipe)


def test_a_rehearsal_draws_nothing():
    torch.manual_seed(5)
    expected = LoRA(r=2).init((8, 8), torch.float32, torch.device("cpu"))[0]
    torch.manual_seed(5)
    model = efftune.apply(Perceptron(3), "int8 + lora(r=2)").model
    torch.manual_seed(5)
    model = Perceptron(3)
    torch.manual_seed(5)
    assert torch.equal(efftune.apply(model, "int8 + lora(r=2)").model.layers[0].lora_a, expected)


@pytest.mark.parametrize("recipe", ["int8", "int8(group=4) + mesa", "mezo + int8"])
def test_a_recipe_in_which_nothing_trains_names_what_would(recipe):
    refused(
        Perceptron(3),
        recipe,
        f"'{recipe}' says nothing of what trains",
        "(int8 + lora(r=16)), or train the scales by peqa",
    )
    efftune.apply(Perceptron(3), "int8 + lora(r=4)")
    efftune.apply(Perceptron(3), "int8 + peqa")


# Layers of other libraries


def foreign(kind):
    torch.manual_seed(0)
    model = Perceptron(4)
    for i in (1, 2):
        model.layers[i] = kind(model.layers[i].requires_grad_(False))
    return model


@pytest.mark.parametrize("kind", [RowWise, EightBits])
@pytest.mark.parametrize("adapter", ["lora(r=2)", "peqa"])
def test_a_recipe_reaches_what_a_base_of_it_adopts(kind, adapter):
    model = foreign(kind)
    codes = model.layers[1].int_weight.t() if kind is RowWise else model.layers[1].weight
    x = torch.randn(3, 8)
    reference = foreign(RowWise)(x)
    tuner = efftune.apply(model, [*parse(adapter), Stores(Adopting(8))])
    for layer in model.layers:
        assert isinstance(layer, Linear) and layer.base == Adopting(8)
    assert torch.equal(model.layers[1].codes, codes)
    learns = "scales" if adapter == "peqa" else "lora_b"
    assert {f"layers.{i}.{learns}" for i in range(4)} <= set(tuner.named_trained())
    torch.testing.assert_close(model(x), reference, rtol=0.05, atol=0.05)  # the other two are quantised now
    tuner.backward(x, lambda m, x: m(x).square().mean())
    assert model.layers[2].get_parameter(learns).grad is not None


def test_a_foreign_layer_that_no_base_adopts_or_no_target_means_stays():
    for recipe in (parse("lora(r=2)"), parse("int8 + lora(r=2)")):
        model = foreign(RowWise)
        efftune.apply(model, recipe)
        assert [type(m) for m in model.layers] == [Linear, RowWise, RowWise, Linear]


@pytest.mark.parametrize("swap", [False, True])
def test_the_order_of_bases_changes_nothing(swap):
    terms = [*parse("int8(target_modules='layers.0')"), Stores(Adopting(8), ("1", "2"))]
    model = foreign(RowWise)
    efftune.apply(model, [*(terms[::-1] if swap else terms), *parse("lora(r=2)")])
    assert [m.base for m in model.layers] == [Int8(), Adopting(8), Adopting(8), Dense()]
    with pytest.raises(EfftuneError, match=r"layers.0: stores wants Adopting\(group=\d\) and stores Adopting"):
        bases = [Stores(Adopting(4)), Stores(Adopting(8))]
        efftune.apply(foreign(RowWise), [*(bases[::-1] if swap else bases), *parse("lora(r=2)")])


@pytest.mark.parametrize(
    "recipe, words",
    [
        (
            "lora(target_modules='(')",
            r"'\(' is no regular expression \(.*\); give one, or a list of names",
        ),
        ("full(target_modules='[')", "is no regular expression"),
        ("lora(target_modules=['q_proj', 'q_prj'])", r"target_modules=\['q_prj'\] matches no linear layer of Llama"),
    ],
)
def test_what_target_modules_cannot_mean(recipe, words):
    with pytest.raises(EfftuneError, match=words):
        efftune.apply(llama(), recipe)
