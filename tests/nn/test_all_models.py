"""Every model of the installed transformers: what is swapped in it computes the same, in training and in evaluation
mode, on small inputs and on large ones, called by the name of its argument, and has the same attributes. Models are
built without data, their modules get small weights of their own.

    python -m pytest -q -s -m slow tests/nn/test_all_models.py    # prints what is swapped, left alone and not built
"""

import collections
import inspect
import re

import pytest
import torch
from torch import nn

from efftune.hooks import watched
from efftune.interop.transformers.blocks import GATED, install
from efftune.linear.keep.quantized import Quantized
from efftune.nn import probe

COUNTS = re.compile(r"(.*_)?(num_hidden_layers|num_layers|n_layers?|layers|num_blocks|n_blocks|depth)")
WIDTH = 24  # of what goes into the small gated MLPs


def shrink(config):
    """Two layers of each stack, so that few modules are built."""
    for name, value in list(vars(config).items()):
        if isinstance(value, int) and not isinstance(value, bool) and COUNTS.fullmatch(name) and value > 2:
            setattr(config, name, 2)
        elif isinstance(value, list) and name.endswith("layer_types"):
            setattr(config, name, value[:2])
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
    if getattr(config, "head_dim", 0) is None:  # without it some have no default rotary embedding
        config.head_dim = config.hidden_size // config.num_attention_heads
    return config


def build(config, kind, reasons):
    """The model on the meta device; with all of its layers where it takes no fewer. None if it cannot be built."""
    for make in (lambda: shrink(config()), config):
        try:
            with torch.device("meta"):
                return kind(make())
        except Exception as error:  # a config without defaults, or a package that is not installed
            reasons.append(str(error).strip().splitlines()[-1][:120] if str(error) else type(error).__name__)
    return None


def models():
    from transformers import AutoModel

    for config in list(AutoModel._model_mapping.keys()):
        try:
            kind = AutoModel._model_mapping[config]
        except Exception:  # a name in the table without a class
            yield config, None
            continue
        yield config, kind[0] if isinstance(kind, tuple) else kind


def real(module):
    """A copy with small random weights, other than those that the swap was tried on."""
    parts = [nn.Linear(*size) for size in ((WIDTH, 40), (WIDTH, 40), (40, WIDTH))]
    made = probe.stand_in(module, **(dict(zip(GATED, parts, strict=True)) if is_gated(module) else {}))
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.3, 0.7)
    return made


def is_gated(module):
    return set(GATED) <= module._modules.keys()


def is_candidate(module):
    """What is looked at: by name, by children, and whatever has neither weights nor children."""
    named = type(module).__name__.endswith("RMSNorm") or isinstance(module, nn.LayerNorm) or is_gated(module)
    return named or not (module._modules or module._parameters or module._buffers)


@torch.no_grad()
def differences(old, new, width):
    """Relative errors of new against old, in units of what float32 rounds."""
    found = {}
    argument = list(inspect.signature(old.forward).parameters)[0]
    for training in (True, False):
        for scale in (1e-6, 1e-3, 1.0, 1e2, 1e5):
            torch.manual_seed(int(scale))
            x = scale * torch.randn(3, 5, width)
            results = []
            for module in (old, new):
                torch.manual_seed(7)
                results.append(module.train(training)(**{argument: x.clone()}).double())
            expected, got = results
            error = (got - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny)
            found[training, scale] = float(error) / torch.finfo(torch.float32).eps
    return found


@pytest.mark.slow
def test_every_swap_in_every_model_is_the_same_function():
    torch.manual_seed(0)
    swapped, alone, wrong, failed, built = collections.Counter(), collections.Counter(), [], [], 0
    for config, kind in models():
        reasons = []
        model = None if kind is None else build(config, kind, reasons)
        if model is None:
            failed.append(f"{config.__name__} ({reasons[-1] if reasons else 'no class'})")
            continue
        built += 1
        seen = set()
        for module in model.modules():
            if not is_candidate(module) or watched(module):
                continue
            key = type(module), repr(module)
            if key in seen:
                continue
            seen.add(key)
            if module._buffers or any(m._buffers for m in module.modules()):
                continue  # left alone, and without data here
            old = real(module)
            net = nn.Sequential(old)
            install(net, Quantized(8))
            name = f"{kind.__name__}: {type(module).__name__}"
            if net[0] is old:
                if not type(module).__module__.startswith("torch."):
                    alone[type(module).__name__] += 1
                continue
            swapped[type(module).__name__] += 1
            width = getattr(module, "normalized_shape", None) or [len(p) for p in module.parameters()] or [64]
            width = WIDTH if is_gated(module) else width[0]
            off = {at: e for at, e in differences(old, net[0], width).items() if not e < 8}
            internal = vars(nn.Module())
            off |= {n: "is lost" for n in vars(old) if n not in internal and not hasattr(net[0], n)}
            if off:
                wrong.append(f"{name}: {off}")
        del model
    print(f"\n{built} models built, {len(failed)} not:", *failed, sep="\n  ")
    print(f"swapped, in so many models: {dict(swapped)}\nleft alone: {dict(alone)}")
    assert not wrong, "\n".join(wrong)
    assert built > 0.9 * (built + len(failed)) and sum(swapped.values()) > built
