"""Full fine-tuning: the weights themselves train."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.methods._base import TRAINS, Method
from efftune.structure import matches


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Trains every floating-point parameter of the modules that `target_modules` selects, or of the whole model where
    it is None.

    A linear layer that keeps its input exactly stays an nn.Linear, because there is nothing to save on it.

    Args:
        target_modules: a regular expression, or a list of path endings.
    Raises: EfftuneError where nothing matches, or where a layer's storage cannot be trained (int8 codes).
    """

    target_modules: str | tuple[str, ...] | None = None

    name = "full"
    phase = TRAINS

    def plan(self, plan):
        if self.target_modules is None:
            plan.train_modules(self, [""])
            return
        model = plan.model
        chosen = [name for name, _ in model.named_modules() if matches(name, self.target_modules)]
        if not chosen:
            endings = ", ".join(sorted({n.rpartition(".")[2] for n, _ in model.named_modules() if n}))
            raise EfftuneError(
                f"target_modules={self.target_modules!r} matches no module of {type(model).__name__}; "
                f"its modules end in: {endings}."
            )
        plan.train_modules(self, chosen)
