"""Block recompute: keep only a block's inputs, and in backward run it again, on all samples of the batch or on a few.

    recompute = install(block)                # checkpointing
    recompute = install(block, ratio=0.5)     # backward runs on half of the samples; recompute.ratio may change later
    uninstall(block)

With a ratio below 1, backward draws k = ratio·B samples with p_i ∝ ‖G_i‖ (G the gradient of the block's output), runs
the block again on their inputs alone and sends weight_i·G_i through it, weight_i = 1/p_i: an unbiased estimate of every
gradient. All operators of the block shrink by k/B, whatever they are. In units of the block's forward a step costs
1 + 3·ratio, against 4 for checkpointing and 3 for keeping everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from efftune.errors import EfftuneError
from efftune.nn import rotary
from efftune.ops._op import forced_backend, use_backend
from efftune.ops.draw_seed import draw_seed
from efftune.ops.dropout import dropout
from efftune.ops.sample_rows import select_rows
from efftune.random_state import generators, has_drawn, replaying, set_generators

SELECT_STREAM, BLOCK_DROPOUT_STREAM = 0, 1 << 16  # of one seed; streams that follow each are the repeat and the call
# How dropout inside the block is drawn: by torch, a seed per sample, or that with attention written out in full
# (a fused attention kernel draws where nothing can be put in its place). A block goes to the first that replays.
BY_TORCH, BY_ROW, BY_ROW_MATH = range(3)
SEED_OF_PROOF = torch.zeros((), dtype=torch.int64, device="cpu")


def install(block: nn.Module, ratio: float | None = None) -> Recompute:
    """Makes `block` keep its inputs only. Names in the state_dict, hooks and parameters stay as they are.

    Args:
        block: takes tensors in any nesting of positional and keyword arguments, and gives a tensor or a nesting of
            them. The first dimension of its first floating-point input of at least 2 dimensions is the batch. It uses
            its own parameters and its arguments, nothing else that requires grad.
        ratio: share of the samples that backward uses, in (0, 1], in training mode; None: plain checkpointing.
    """
    uninstall(block)
    recompute = Recompute(block, ratio)
    block.forward = recompute  # a plain attribute: nothing of it enters the state_dict
    return recompute


def uninstall(block: nn.Module) -> None:
    """Gives the block its own forward back; does nothing where none is installed."""
    installed = vars(block).get("forward")
    if isinstance(installed, Recompute):
        del block.forward
        if installed.own is not None:
            block.forward = installed.own


class Recompute:
    """What `install` puts in the place of `block.forward`.

    ratio = 1 is bit for bit checkpointing. Below 1 the samples must not depend on each other: the first training call
    with arguments of a new kind runs the block on one sample alone and refuses if that gives something else (batch
    norm, a batch that is not the first dimension, an argument cut that is not per sample).
    Arguments: tensors whose first dimension is the batch are cut with it; others go in whole. Caches of keys and
        values are left out, as checkpointing in transformers does.
    Results: gradients flow through what the block returns. What a hook inside it takes out (attention maps, router
        logits of a mixture) has none, and hooks inside it run again in backward.
    Running statistics (BatchNorm): those of one run of the block; backward's does not count.
    Dropout: at ratio 1 the generator's state is put back; below 1 every sample has a mask of its own, drawn from a
        seed, so that a part of the batch sees what it saw. Other draws are refused below 1.
    Numerics: weight·G in f32, rounded once to G's dtype.
    Saved for backward: the tensor arguments (shared ones once).
    Raises: EfftuneError if the batch cannot be told, if samples depend on each other, or for draws that no part of a
        batch can repeat.
    """

    def __init__(self, block: nn.Module, ratio: float | None):
        if ratio is not None and not 0 < ratio <= 1:
            raise EfftuneError(f"A block recomputes a share in (0, 1] of its samples, not {ratio}.")
        self.block = block
        self.own = vars(block).get("forward")  # somebody else's override
        self.sampled = ratio is not None
        self.ratio = 1.0 if ratio is None else ratio
        self.repeat = 0  # another selection from the same seed
        self.by_row = False  # per-sample dropout at ratio 1 too: the same function as that of a sampled call
        self.norms: Tensor | None = None  # ‖G_i‖ (B,) of the last backward, if `record`
        self.record = False
        self.draws = BY_TORCH
        self.proved: set[tuple] = set()

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_cache)
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in where]
        parameters = [p for p in self.block.parameters() if p.requires_grad]
        if not parameters and not any(t.requires_grad for t in tensors):
            return self.forward(*args, **kwargs)
        call = _Call(self, self._without(leaves), spec, where, tensors, parameters)
        flat = _SubBatch.apply(call, *tensors, *parameters)
        return pytree.tree_unflatten(call.filled(call.out_leaves, call.out_where, flat), call.out_spec)

    def forward(self, *args, **kwargs):
        # Checkpointing of the model's own would only do what is done here a second time.
        inner = getattr(self.block, "gradient_checkpointing", False)
        if inner:
            vars(self.block)["gradient_checkpointing"] = False
        try:
            return self.own(*args, **kwargs) if self.own else type(self.block).forward(self.block, *args, **kwargs)
        finally:
            if inner:
                vars(self.block)["gradient_checkpointing"] = inner

    def _without(self, leaves: list) -> list:
        """The arguments with caches replaced by None and tensors by placeholders."""
        layer = next((m.layer_idx for m in self.block.modules() if getattr(m, "layer_idx", None) is not None), 0)
        for cache in filter(_is_cache, leaves):
            if _holds_keys(cache, layer):
                raise EfftuneError(f"{self}: backward cannot run a block again whose cache holds keys; pass no cache.")
        return [None if _is_cache(leaf) or isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def __str__(self) -> str:
        return f"recompute of {type(self.block).__name__}"


def _is_cache(value: Any) -> bool:
    """By what it can do: the name of a block's argument for it changes between versions of transformers."""
    return hasattr(value, "get_seq_length")


def _holds_keys(cache: Any, layer: Any) -> bool:
    try:
        return cache.get_seq_length(layer) > 0
    except ValueError:  # a layer of linear attention, which has a state and no length
        return cache.has_previous_state(layer)


class _Call:
    """One call of a block: all that backward needs beside the saved tensors."""

    def __init__(self, owner: Recompute, leaves: list, spec, where: list[int], tensors: list[Tensor], parameters: list):
        self.owner, self.leaves, self.spec, self.where, self.parameters = owner, leaves, spec, where, parameters
        self.requires_grad = [t.requires_grad for t in tensors]
        self.rotary = [rotary.is_marked(t) for t in tensors]
        self.device = (tensors or parameters)[0].device
        kind = self.device.type
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.backend = forced_backend()
        self.generators: tuple | None = None  # to put back in backward
        self.out_leaves: list = []
        self.out_where: list[int] = []
        self.out_spec: Any = None
        self.repeat, self.record = owner.repeat, owner.record
        self.draws = BY_TORCH
        self.seed = SEED_OF_PROOF
        self.batch = self.count = 0
        self.cut = [False] * len(tensors)
        self.by_row = False
        if owner.sampled and owner.block.training:
            self.sample(tensors)

    def sample(self, tensors: list[Tensor]) -> None:
        """Finds the batch, what is cut with it, and how many samples backward takes."""
        owner = self.owner
        hidden = next((t for t in tensors if t.is_floating_point() and t.dim() > 1), None)
        if hidden is None:
            raise EfftuneError(f"{owner}: no argument has a batch dimension, so samples cannot be told apart.")
        self.batch = hidden.shape[0]
        self.count = max(1, min(self.batch, math.floor(owner.ratio * self.batch + 0.5)))
        self.cut = [t.dim() > 0 and t.shape[0] == self.batch for t in tensors]
        kinds = tuple((t.dim(), cut) for t, cut in zip(tensors, self.cut, strict=True))
        if self.batch > 1 and kinds not in owner.proved:
            self.prove(tensors, hidden)
            owner.proved.add(kinds)
        self.by_row = self.count < self.batch or owner.by_row
        if self.by_row:
            self.seed = draw_seed()

    @staticmethod
    def filled(leaves: list, where: list[int], tensors) -> list:
        leaves = list(leaves)
        for i, tensor in zip(where, tensors, strict=True):
            leaves[i] = tensor
        return leaves

    def run(self, tensors, rows: Tensor | None = None) -> list[Tensor]:
        """The block on these tensors, which are the samples `rows` of the batch (None: all). Returns its tensors."""
        args, kwargs = pytree.tree_unflatten(self.filled(self.leaves, self.where, tensors), self.spec)
        enabled, dtype = self.autocast
        with ExitStack() as stack:
            # Without its cache of cast weights: one made under no_grad would cut the recomputed graph off from them.
            stack.enter_context(torch.autocast(self.device.type, dtype, enabled, cache_enabled=False))
            if self.backend is not None:
                stack.enter_context(use_backend(self.backend))
            if self.draws >= BY_ROW:
                stack.enter_context(RowDropout(self.seed, self.batch, rows))
            if self.draws == BY_ROW_MATH:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            leaves, self.out_spec = pytree.tree_flatten(self.owner.forward(*args, **kwargs))
        self.out_where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.out_leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return [leaves[i] for i in self.out_where]

    def first_run(self, tensors) -> list[Tensor]:
        """`run`, so that it can be repeated: by the generator's state, or from the call's seed."""
        before = generators(self.device)
        if not self.by_row:
            out = self.run(tensors)
            self.generators = before if has_drawn(before, self.device) else None
            return out
        for how in range(self.owner.draws, BY_ROW_MATH + 1):
            self.draws = how
            out = self.run(tensors)
            if not has_drawn(before, self.device):
                self.owner.draws = how
                return out
            set_generators(before, self.device)
        raise EfftuneError(
            f"{self.owner}: the block draws random numbers other than dropout's, which no part of a batch can repeat; "
            "turn that off or keep all samples (ratio=1)."
        )

    @torch.no_grad()
    def prove(self, tensors: list[Tensor], hidden: Tensor) -> None:
        """Refuses a block whose result for one sample is another when the sample is alone."""
        self.by_row = True
        last = torch.tensor([self.batch - 1], device=self.device)
        with statistics_kept(self.owner.block):
            whole = self.first_run(tensors)
            try:
                alone = self.run(self.take(tensors, last), last)
            except (RuntimeError, ValueError, IndexError) as error:
                raise EfftuneError(f"{self.owner} fails on one sample alone ({error}): {WHY_NOT}.") from error
        for all_of, one in zip(whole, alone, strict=True):
            if not all_of.is_floating_point():
                continue
            if all_of.shape[:1] != (self.batch,) or one.shape != (1, *all_of.shape[1:]):
                raise EfftuneError(f"{self.owner}: a result of shape {tuple(all_of.shape)} has no batch: {WHY_NOT}.")
            row = all_of[-1:].float()
            change = row - hidden[-1:].float() if hidden.shape == all_of.shape else row  # without the residual stream
            half = all_of.dtype.itemsize == 2 or (self.autocast[0] and self.autocast[1].itemsize == 2)
            allowed = (0.02 if half else 1e-3) * change.norm() + 8 * torch.finfo(all_of.dtype).eps * row.norm()
            if not bool((row - one.float()).norm() <= allowed):
                raise EfftuneError(f"{self.owner} gives another result for a sample alone: {WHY_NOT}.")
        self.draws = BY_TORCH

    def take(self, tensors, rows: Tensor | None) -> list[Tensor]:
        if rows is None:
            return list(tensors)
        return [t.index_select(0, rows) if cut else t for t, cut in zip(tensors, self.cut, strict=True)]


WHY_NOT = (
    "samples depend on each other, or the first dimension is not the batch, or an argument is not per sample; "
    "keep all samples there (plain recompute)"
)


class _SubBatch(torch.autograd.Function):
    # Parameters are inputs, so that their gradients go through autograd: hooks, accumulation, torch.autograd.grad.
    @staticmethod
    def forward(ctx, call: _Call, *tensors):
        ctx.set_materialize_grads(False)
        inputs = tensors[: len(call.where)]
        out = call.first_run(inputs)
        ctx.call = call
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*(t for t in out if not t.is_floating_point()))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        call, inputs = ctx.call, ctx.saved_tensors
        if all(g is None for g in grads):
            return (None,) * (1 + len(inputs) + len(call.parameters))
        rows = weight = None
        if call.record or call.count < call.batch:
            norms = sample_norms(grads)
            if call.record:
                call.owner.norms = norms
            if call.count < call.batch:
                rows, weight, _ = select_rows(norms.float(), call.count, call.seed, stream=SELECT_STREAM + call.repeat)
        with torch.enable_grad(), replaying(call.generators, call.device), statistics_kept(call.owner.block):
            sub = [
                t.detach().requires_grad_(needed)
                for t, needed in zip(call.take(inputs, rows), call.requires_grad, strict=True)
            ]
            for t, marked in zip(sub, call.rotary, strict=True):
                if marked:  # a new tensor has none of the old one's attributes
                    rotary.set_marked(t)
            out = call.run(sub, rows)
        pairs = [(o, g) for o, g in zip(out, grads, strict=True) if g is not None and o.requires_grad]
        wrt = [*(t for t in sub if t.requires_grad), *call.parameters]
        if rows is not None and weight is not None:
            pairs = [(o, weighted(g.index_select(0, rows), weight)) for o, g in pairs]
        found = iter(_grad(pairs, wrt))
        dinputs = []
        for t, cut, needed in zip(inputs, call.cut, call.requires_grad, strict=True):
            g = next(found) if needed else None
            if g is not None and cut and rows is not None:
                g = torch.zeros(t.shape, dtype=g.dtype, device=g.device).index_copy_(0, rows, g)
            dinputs.append(g)
        return None, *dinputs, *found


def _grad(pairs: list[tuple[Tensor, Tensor]], wrt: list[Tensor]) -> tuple[Tensor | None, ...]:
    if not pairs:
        return (None,) * len(wrt)
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, wrt, grads, allow_unused=True)


def sample_norms(grads) -> Tensor:
    """‖G_i‖ (B,) over all gradients of one block's results, in f32 (f64 of f64)."""
    parts = [
        torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.promote_types(g.dtype, torch.float32))
        for g in grads
        if g is not None
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).norm(dim=0)


def weighted(g: Tensor, weight: Tensor) -> Tensor:
    return (g * weight.view(-1, *(1,) * (g.dim() - 1))).to(g.dtype)


class RowDropout(TorchDispatchMode):
    """Within it every dropout draws its mask a sample at a time from (seed, number of the dropout, sample).

    A mask is drawn for the whole batch and cut: that costs less than a thousandth of a transformer block's products.
    """

    def __init__(self, seed: Tensor, batch: int, rows: Tensor | None):
        super().__init__()
        self.seed, self.batch, self.rows, self.stream = seed, batch, rows, BLOCK_DROPOUT_STREAM

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bernoulli_.float:  # torch's dropout on the CPU
            noise, keep = args[0], args[1] if len(args) > 1 else 0.5
            return noise.copy_(self.mask(noise, 1 - keep))
        if func is torch.ops.aten.native_dropout.default and args[2] is not False:  # and on a GPU
            x, p = args[:2]
            mask = self.mask(x, p)
            return torch.where(mask, x * (1 / (1 - p)), 0), mask
        return func(*args, **(kwargs or {}))

    def mask(self, x: Tensor, p: float) -> Tensor:
        """Bool, like x, whose first dimension begins with the samples (it may go on with the heads)."""
        count = self.batch if self.rows is None else len(self.rows)
        if not x.dim() or x.shape[0] % count:
            raise EfftuneError(f"dropout of a tensor of shape {tuple(x.shape)} in a batch of {count}: {WHY_NOT}.")
        self.stream += 1
        if p >= 1:
            return torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        ones = torch.ones(self.batch, x.numel() // count, dtype=torch.bfloat16, device=x.device)
        mask = dropout(ones, p, self.seed, self.stream) != 0
        return (mask if self.rows is None else mask.index_select(0, self.rows)).view(x.shape)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Running statistics within `module` are afterwards as before: a batch that runs again is not another batch."""
    norms = [m for m in module.modules() if getattr(m, "running_mean", None) is not None]
    # Through .data, whose writes autograd does not count: the graph of what ran within has saved these buffers.
    buffers = [(buffer.data, buffer.clone()) for m in norms for buffer in m.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)


def probabilities(scores: Tensor, k: float) -> Tensor:
    """Water-filling: p_i = min(1, c·scores_i) with Σp = k, in f64. Where fewer than k scores are positive those have
    p = 1 and the rest share what is left."""
    n = scores.numel()
    scores = scores.double()
    if k >= n:
        return torch.ones_like(scores)
    ordered = scores.sort(descending=True).values
    tail = ordered.flip(0).cumsum(0).flip(0)  # Σ_{i ≥ j}
    left = k - torch.arange(n, dtype=torch.float64, device=scores.device)
    first = ((ordered * left <= tail) | (left <= 0)).to(torch.uint8).argmax()  # how many have p = 1
    rest, budget = tail[first], left[first]
    p = (scores * (budget / rest)).clamp(max=1.0)
    spread = torch.where(scores > 0, 1.0, budget / (n - first))  # rest = 0: all positive scores are certain
    return torch.where(rest > 0, p, spread)
