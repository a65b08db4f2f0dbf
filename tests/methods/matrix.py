"""The recipes that every promise of the contract is kept for, computed from the methods that there are.

Each method stands on one of five axes, told by what it does: how weights are stored (base), what trains (delta), what
backward keeps (keep), where the estimate of the gradient comes from (estimator), and what trains when, or runs when
(schedule). RECIPES holds the rows with settings of their own; `complete` adds as few rows as it takes to have every two
values of different axes that combine in some recipe, and two methods of one axis where they do. A method that is new
gets its rows without being named here, with its default settings unless SETTINGS has others.
"""

import functools
import importlib
import inspect
import itertools
import pkgutil

from efftune import EfftuneError
from efftune.linear.contracts import Base, Delta, Keep
from efftune.methods import available
from efftune.methods._base import ESTIMATES, TRAINS
from efftune.plan import Layer
from efftune.recipe import parse
from efftune.tuner import planned
from tests.methods.models import contract_model
from tests.pairwise import pairwise

# recipe -> (learning rate, steps, factor the loss must fall to)
RECIPES = {
    "full": (3e-3, 12, 0.8),
    "full(target_modules='mlp')": (3e-3, 12, 0.95),
    "lora(r=4)": (1e-2, 12, 0.95),
    "lora(r=4, target_modules='q_proj|v_proj', lora_alpha=8.0, use_rslora=True)": (1e-2, 15, 0.99),
    "lora(r=4, lora_dropout=0.1, dtype=None)": (1.5e-2, 12, 0.95),
    "lora(r=4, freeze_a=True)": (1e-2, 12, 0.97),
    "dora(r=4)": (1e-2, 12, 0.95),
    "int8(group=16) + dora(r=4, lora_dropout=0.1, dtype=None) + mesa(bits=8)": (1e-2, 12, 0.95),
    "hira(r=4)": (1e-1, 12, 0.95),
    "hira(r=4, dtype=None) + wtacrs(ratio=0.5, min_rows=4)": (1e-1, 12, 0.97),
    "shira(density=0.05)": (3e-2, 12, 0.97),
    "shira(r=2, scorer='small')": (1e-2, 12, 0.97),
    "lift(rank=4, every=4)": (3e-2, 12, 0.97),
    "spiel(density=0.05, every=4, accumulate=2)": (3e-2, 12, 0.97),
    "spiel(density=0.05, every=4, accumulate=2, criterion='ma')": (3e-2, 12, 0.97),
    "saft(density=0.02)": (3e-2, 12, 0.97),
    "s2ft(ratio=0.3)": (1e-1, 12, 0.97),
    "sara(density=0.2, again=4, renew=3)": (3e-2, 12, 0.97),
    "sara(threshold=0.005, again=0, nuclear=0) + mezo": (1e-3, 30, 1.0),
    "sara(density=0.2, again=0) + ferret(local_steps=4)": (1e-2, 12, 1.0),
    "ltsft(density=0.05, after=2)": (3e-2, 12, 0.97),
    "mft(density=0.05)": (2e-3, 12, 0.99),
    "ramt(density=0.5, drop=0.2)": (2e-3, 12, 0.99),
    "int8(group=16) + lora(r=4)": (1e-2, 12, 0.95),
    "lora(r=4) + int8": (1e-2, 12, 0.95),
    "int8(group=16) + peqa": (1e-3, 12, 0.97),
    "int8(group=16) + peqa + wtacrs(ratio=0.5, min_rows=4) + mesa": (1e-3, 12, 0.99),
    "lisa(layers=1, interval=4)": (3e-3, 12, 0.9),
    "full + lisa(layers=2)": (3e-3, 12, 0.85),
    "lora(r=4) + lisa(layers=2, interval=3)": (1e-2, 12, 0.97),
    "full + mesa(bits=8)": (3e-3, 12, 0.8),
    "lora(r=4) + mesa(bits=4, max_error=0.02)": (1e-2, 12, 0.95),
    "full + wtacrs(ratio=0.5, min_rows=4)": (3e-3, 12, 0.9),
    "lora(r=4) + wtacrs(ratio=0.5, min_rows=4) + mesa(bits=4)": (1e-2, 12, 0.97),
    "vcas(interval=2, alpha=0.2)": (3e-3, 12, 0.8),
    "full + vcas(interval=0, sample_ratio=0.5, row_ratio=0.5)": (3e-3, 12, 0.95),
    "lora(r=4) + vcas(interval=3)": (1e-2, 12, 0.97),
    "int8 + lora(r=4) + vcas(interval=0, sample_ratio=0.5) + lisa(layers=2, interval=3)": (1e-2, 12, 0.99),
    "lora(r=4) + recompute + mesa(bits=8)": (1e-2, 12, 0.95),
    "mezo": (1e-3, 30, 1.0),
    "lora(r=4) + mezo(dist='rademacher')": (1e-2, 30, 1.0),
    "mezo(samples=2, beta2=0.9, momentum=0.5)": (3e-4, 30, 1.0),
    "sparsemezo": (1e-3, 30, 1.0),
    "int8(group=16) + peqa + mezo(eps=1e-5)": (1e-6, 30, 1.0),
    "fedkseed(k=64, pro=True, interval=5)": (1e-3, 30, 1.0),
    "ferret(local_steps=4)": (3e-3, 12, 0.9),
    "lora(r=4) + ferret(k=2, block=16, local_steps=3, dist='normal')": (1e-2, 12, 0.99),
    "lora(r=4) + wtacrs(ratio=0.5, min_rows=4) + lisa(layers=2, interval=3) + ferret(local_steps=2)": (1e-2, 12, 1.0),
    "int8 + lora(r=2, target_modules=['q_proj', 'down_proj']) + lora(r=4, target_modules='v_proj')": (1e-2, 12, 0.99),
}

# Of the rows that are computed, for a model as small as the contract's.
SETTINGS = {
    "int8": "group=16",
    "lora": "r=4",
    "dora": "r=4",
    "hira": "r=4",
    "shira": "density=0.05",
    "lift": "rank=4, every=5",
    "spiel": "density=0.05, every=5, accumulate=2",
    "saft": "density=0.05",
    "s2ft": "ratio=0.3",
    "sara": "again=5, renew=2",
    "ltsft": "after=2",
    "ramt": "density=0.5",
    "wtacrs": "ratio=0.5, min_rows=4",
    "vcas": "interval=3",
    "lisa": "layers=1, interval=3",
    "ferret": "local_steps=3",
    "fedkseed": "k=64",
    "stagefilter": "window=40",  # steps, in which all rows train: the loss of those that are hard later does not fall
}
LEARNING_RATES = {
    "lora": 1e-2,
    "dora": 1e-2,
    "hira": 1e-1,
    "peqa": 1e-3,
    "shira": 1e-2,
    "lift": 1e-2,
    "spiel": 1e-2,
    "saft": 1e-2,
    "s2ft": 1e-1,
    "sara": 1e-2,
    "ltsft": 3e-2,
    "mft": 2e-3,
    "ramt": 2e-3,
}  # else 3e-3
NONE = ""
AXES = "base", "delta", "keep", "estimator", "schedule"
UPDATES = "optimizer", "arrives"  # hooks of a method with an update of its own


def term(name: str, row: tuple = ()) -> str:
    settings = SETTINGS.get(name, "")
    if "peqa" in row and hasattr(available()[name], "eps"):
        settings = ", ".join(filter(None, (settings, "eps=1e-5")))  # a hundredth of the scales, see Peqa
    return f"{name}({settings})" if settings else name


def text(row: tuple) -> str:
    return " + ".join(term(name, row) for name in row if name != NONE)


@functools.cache
def _model():
    return contract_model(layers=2)


def linears(recipe: str) -> list[Layer]:
    """What this recipe wants of the layers of the contract's model."""
    return list(planned(_model(), recipe)[1].layers.values())


@functools.cache
def refusal(recipe: str) -> str | None:
    """What the library says to this recipe, where it refuses it."""
    try:
        linears(recipe)
    except EfftuneError as error:
        return str(error)
    return None


@functools.cache
def axis(name: str) -> str:
    """Of a method: by the hooks that it overrides, and by what it changes on layers with adapters."""
    (method,) = parse(term(name))
    if method.phase == TRAINS:
        return "delta"
    if method.place == ESTIMATES or any(method.overrides(hook) for hook in UPDATES):
        return "estimator"
    before, after = (linears(recipe) for recipe in ("lora(r=4)", f"lora(r=4) + {term(name)}"))
    for which in ("base", "keep"):
        if {getattr(m, which) for m in before} != {getattr(m, which) for m in after}:
            return which
    return "schedule"


@functools.cache
def values() -> dict[str, tuple[str, ...]]:
    """axis -> the methods on it, and NONE where it may be left as it is."""
    named = {which: tuple(name for name in available() if axis(name) == which) for which in AXES}
    return {which: names if which == "delta" else (NONE, *names) for which, names in named.items()}


@functools.cache
def completions(one: tuple[str, str], other: tuple[str, str]) -> tuple[tuple, ...]:
    """Rows with these two (axis, name), which leave other axes alone as far as a recipe can."""
    fixed = dict((one, other))
    free = {"base": values()["base"], "delta": values()["delta"]}
    choices = [(fixed[w],) if w in fixed else free.get(w, (NONE,)) for w in AXES]
    return tuple(itertools.product(*choices))


@functools.cache
def combine(one: tuple[str, str], other: tuple[str, str]) -> bool:
    return any(refusal(text(row)) is None for row in completions(one, other))


def pairs(row) -> list[tuple]:
    return list(itertools.combinations(zip(AXES, row, strict=True), 2))


def row_of(recipe: str) -> tuple:
    """The method on each axis; the last one, where a recipe has two."""
    methods = parse(recipe)
    names = (
        [m.name for m in methods] if any(m.phase == TRAINS for m in methods) else ["full", *(m.name for m in methods)]
    )
    return tuple(next((n for n in reversed(names) if axis(n) == which), NONE) for which in AXES)


def siblings() -> list[tuple[str, str]]:
    """Two methods of one axis. Of what trains and of estimators a recipe takes one for each layer."""
    return [p for which in AXES for p in itertools.combinations([n for n in values()[which] if n], 2)]


def sibling_recipe(one: str, other: str) -> str:
    trained = () if axis(one) == "delta" else ("lora",) if axis(one) == "base" else ("full",)
    return text((*trained, one, other))


def measure(row: tuple) -> tuple[float, int, float]:
    """Learning rate, steps, and the factor the loss must fall to."""
    method = parse(term(row[3]))[0] if row[3] != NONE else None
    if method is not None and method.overrides("optimizer"):  # of zeroth order
        return {"lora": 1e-2, "dora": 1e-2, "hira": 1e-2, "peqa": 1e-6}.get(row[1], 1e-3), 20, 1.0
    return LEARNING_RATES.get(row[1], 3e-3), 12, 1.0 if method is not None else 0.99


@functools.cache
def complete() -> dict[str, tuple[float, int, float]]:
    """RECIPES, and what they leave out."""
    found = dict(RECIPES)
    axes = [values()[which] for which in AXES]
    rows = pairwise(axes, lambda row: all(combine(*p) for p in pairs(row)), map(row_of, RECIPES))
    found |= {text(row): measure(row) for row in rows}
    together = [{m.name for m in parse(recipe)} for recipe in found]
    for pair in siblings():
        if not any(names.issuperset(pair) for names in together) and refusal(sibling_recipe(*pair)) is None:
            found[sibling_recipe(*pair)] = measure(row_of(sibling_recipe(*pair)))
    return found


def kinds(contract: type) -> set[type]:
    """The kinds of a base, delta or keep that efftune.linear has: a file each. What others are made from is none."""
    package = importlib.import_module(f"efftune.linear.{contract.__name__.lower()}")
    files = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    classes = {c for f in files for _, c in inspect.getmembers(f, inspect.isclass) if c.__module__ == f.__name__}
    return {c for c in classes if issubclass(c, contract) and not inspect.isabstract(c)}


CONTRACTS = {"base": Base, "delta": Delta, "keep": Keep}
