"""The one Linear. See `contracts` for its three axes and `module` for the layer."""

from efftune.linear.base.dense import Dense
from efftune.linear.base.int8 import Int8
from efftune.linear.delta.lora import LoRA
from efftune.linear.delta.none import NoDelta
from efftune.linear.delta.trained import Trained
from efftune.linear.keep.exact import Exact
from efftune.linear.keep.nothing import Nothing
from efftune.linear.module import Linear

__all__ = ["Dense", "Exact", "Int8", "Linear", "LoRA", "NoDelta", "Nothing", "Trained"]
