"""Only what is the same function is swapped, and what others call, read or hook stays as they know it."""

import copy

import pytest
import torch
from torch import nn

import efftune
from efftune.interop.transformers.blocks import install
from efftune.linear.keep.quantized import Quantized
from efftune.nn.norm import RMSNorm
from tests.nn.families import model


class Mlp(nn.Module):
    def __init__(self, act=torch.nn.functional.silu):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn = act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DropsInTraining(Mlp):
    p = 0.01

    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), self.p, self.training)


class DropsNothing(DropsInTraining):
    p = 0.0


class ScalesInEvaluation(Mlp):
    def forward(self, x):
        return super().forward(x) * (1 if self.training else 0.5)


class Clamps(Mlp):
    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=1e3), self.up_proj(x)
        return self.down_proj(self.act_fn(gate) * up)


class HasAScale(Mlp):
    """A parameter of its own that does nothing yet."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return super().forward(x) * self.scale


class TakesMore(Mlp):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Detaches(Mlp):
    """The same numbers, and another gradient."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).detach())


class Negated(Mlp):
    def forward(self, x):
        return -super().forward(x)


class Norm(nn.Module):
    def __init__(self, weight=1.0):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((8,), weight)), 1e-6

    def forward(self, x):
        return self.weight * self.normal(x)

    def normal(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class GoodRMSNorm(Norm):
    pass


class SquaredRMSNorm(Norm):
    def forward(self, x):
        return self.weight.square() * self.normal(x)


class EpsOutsideRMSNorm(Norm):
    def normal(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class ExponentialRMSNorm(Norm):
    def __init__(self):
        super().__init__(0.0)

    def forward(self, x):
        return self.weight.exp() * self.normal(x)


class DroppingRMSNorm(Norm):
    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), 0.1, self.training)


class GatedRMSNorm(Norm):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * gate)


class NoisyRelu(nn.Module):
    def forward(self, x):
        return torch.relu(x + torch.randn_like(x) if self.training else x)


class CappedRelu(nn.Module):
    def forward(self, x):
        return x.clamp(0, 1e5)


class StraightThrough(nn.Module):
    def forward(self, x):
        return x + (torch.relu(x) - x).detach()


class LearnedSilu(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("module", "swapped"),
    [
        (Mlp, True), (DropsNothing, True), (DropsInTraining, False), (ScalesInEvaluation, False), (Clamps, False),
        (HasAScale, False), (TakesMore, False), (Detaches, False), (Negated, False),
        (lambda: Mlp(LearnedSilu()), False), (lambda: Mlp(nn.SiLU(inplace=True)), False),
        (GoodRMSNorm, True), (SquaredRMSNorm, False), (EpsOutsideRMSNorm, False), (ExponentialRMSNorm, False),
        (DroppingRMSNorm, False), (GatedRMSNorm, False),
        (nn.ReLU, True), (lambda: nn.ReLU(inplace=True), False), (nn.RReLU, False), (NoisyRelu, False),
        (CappedRelu, False), (StraightThrough, False),
    ],
)  # fmt: skip
def test_only_the_same_function_is_swapped(module, swapped, training):
    """Whatever the mode in which the recipe is applied, and however little the fresh weights show."""
    torch.manual_seed(0)
    made = module().train(training)
    for p in (p for n, p in made.named_parameters() if n.startswith(("gate", "up", "down"))):
        nn.init.zeros_(p)  # every candidate gives the same
    before = torch.get_rng_state()
    net = nn.Sequential(made)
    install(net, Quantized(8))
    assert (net[0] is not made) == swapped and torch.equal(before, torch.get_rng_state())
    assert made.training == training and all(m.training == training for m in made.modules())


def test_what_is_hooked_inside_or_compiled_is_left_alone():
    hooked = Mlp(nn.SiLU())
    hooked.act_fn.register_forward_hook(lambda *_: None)
    compiled = Mlp(nn.SiLU())
    compiled.compile(backend="eager")
    net = nn.Sequential(hooked, compiled)
    install(net)
    assert net[0] is hooked and net[1] is compiled


@pytest.mark.parametrize("kind", ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"])
@pytest.mark.parametrize(
    "make", [lambda: nn.LayerNorm(8), GoodRMSNorm, nn.GELU, Mlp], ids=["layer", "rms", "act", "mlp"]
)
def test_what_has_a_hook_on_its_state_dict_is_left_alone(make, kind):
    hooked = make()
    getattr(hooked, f"register_{kind}_hook")(lambda *_: None)
    net = nn.Sequential(hooked, make())
    install(net)
    assert net[0] is hooked and type(net[1]) is not type(hooked)


@pytest.mark.parametrize("method", ["_save_to_state_dict", "_load_from_state_dict", "get_extra_state"])
def test_what_has_a_state_dict_of_its_own_is_left_alone(method):
    own = type("OwnRMSNorm", (GoodRMSNorm,), {method: lambda self, *_: None})
    net = nn.Sequential(own())
    assert not install(net).swaps


def test_what_transformers_calls_and_reads_is_there_after_the_swap():
    """Arguments by their names, and attributes by theirs."""
    from transformers.activations import ACT2FN
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2)
    net = nn.Sequential(LlamaRMSNorm(8), nn.LayerNorm(8), nn.LayerNorm(8, bias=False), LlamaMLP(config), ACT2FN["gelu"])
    plain, x = copy.deepcopy(net), torch.randn(2, 8)
    assert len({id(swap[3]) for swap in install(net).swaps if swap[0] is net}) == len(net)
    for old, new, name in zip(plain, net, ("hidden_states", "input", "input", "x", "input"), strict=True):
        torch.testing.assert_close(new(**{name: x}), old(**{name: x}))
        internal = vars(nn.Module())
        missing = [n for n in (*vars(old), *old._modules) if n not in internal and not hasattr(new, n)]
        assert not missing and set(new.state_dict()) == set(old.state_dict())
        with pytest.raises(TypeError, match="one tensor"):
            new(x, another=x)
        with pytest.raises(TypeError, match="one tensor"):
            new()
    assert net[0].variance_epsilon == plain[0].variance_epsilon and net[3].act_fn is not None
    assert net[1].normalized_shape == (8,) and isinstance(net[1], nn.LayerNorm)  # a trainer asks for the class


def test_weight_decay_leaves_the_same_parameters_out():
    from transformers.trainer_pt_utils import get_parameter_names

    plain = model("GPT2")
    before = get_parameter_names(plain, [nn.LayerNorm])
    assert any("ln_" not in name for name in before)
    efftune.apply(plain, "full")
    assert get_parameter_names(plain, [nn.LayerNorm]) == before


@pytest.mark.parametrize("promotes", [False, True])
def test_a_narrow_input_of_a_norm_with_wide_weights_gives_the_models_dtype(promotes):
    class OneRMSNorm(Norm):
        def forward(self, x):
            y = self.weight * self.normal(x.float()).to(x.dtype)
            return y if promotes else y.to(x.dtype)

    net, x = nn.Sequential(OneRMSNorm()), torch.randn(3, 8).bfloat16()
    expected = net(x)
    install(net)
    assert isinstance(net[0], RMSNorm) and net(x).dtype == expected.dtype
    torch.testing.assert_close(net(x), expected, rtol=2**-7, atol=0)


def test_a_gated_mlp_with_something_more_is_left_alone():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
            self.dropout, self.act_fn = nn.Dropout(0.5), torch.nn.functional.silu

        def forward(self, x):
            return self.dropout(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))

    net = nn.Sequential(Mlp())
    assert not install(net).swaps
