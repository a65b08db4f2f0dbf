"""What of a layer's input is held for backward."""

from efftune.linear.keep.exact import Exact
from efftune.linear.keep.nothing import Nothing
from efftune.linear.keep.quantized import Quantized
from efftune.linear.keep.sampled import Sampled

__all__ = ["Exact", "Nothing", "Quantized", "Sampled"]
