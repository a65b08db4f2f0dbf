"""Training kernels for memory-constrained fine-tuning on one GPU, as drop-in torch modules.

    tuner = efftune.apply(model, "int8 + lora(r=16)")

Imports stay cheap: nothing is probed, patched or compiled here.
"""

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.ops._op import use_backend
from efftune.ops.perturb import perturb, perturb_
from efftune.saved import load
from efftune.tuner import Tuner, apply

__version__ = "0.1.0"
__all__ = ["EfftuneError", "Linear", "Tuner", "apply", "load", "perturb", "perturb_", "use_backend"]
