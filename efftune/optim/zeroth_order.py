"""SGD along random directions that are never stored: a seed and a scalar stand for a gradient."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.ops.perturb import perturb_many_
from efftune.optim.directions import Directions, stream_of
from efftune.optim.scalars import Scalars
from efftune.optim.seed_log import Direction, SeedLog, by_group, checksum

UPDATES = ("stochastic", "exact", "log")
PER_LAYER = ("none", "variance", "expectation")
Sum = tuple[list[int], Tensor]  # seeds, and by seed the sum of its scalars (n,) float64
FORGOTTEN = 1e-3  # of a direction's first weight: with momentum, directions that weigh less are left out


def check(dist: str, momentum: float, beta2: float, update: str, per_layer: str, sparsity: float) -> None:
    """Raises: EfftuneError for settings of ZerothOrderSGD that are out of range."""
    for setting, value, known in (
        ("dist", dist, ("normal", "rademacher")),
        ("update", update, UPDATES),
        ("per_layer", per_layer, PER_LAYER),
    ):
        if value not in known:
            raise EfftuneError(f"{setting} is {' or '.join(map(repr, known))}, not {value!r}.")
    for setting, value in (("momentum", momentum), ("beta2", beta2), ("sparsity", sparsity)):
        if not 0 <= value < 1:
            raise EfftuneError(f"{setting} lies in [0, 1), and is not {value}.")


class ZerothOrderSGD(torch.optim.Optimizer):
    """c_i = −lr · a_i / (√v + 1e-8);   w ← (1 − lr·weight_decay) · w + u · Σ_i momentum^(steps since i) · c_i · z_i

    z is drawn again from its seed, no buffer of w's size exists. v is the running mean of a² with beta2 > 0 (the
    second moment of Adam, of which a·z has one number), and absent otherwise. With momentum the Σ runs over the steps
    whose weight is above 1e-3 (66 of them at 0.9), one draw of z for each, in one pass over w; the learning rate of a
    direction is that of the step that found it.

    Args:
        params: groups of ("name", parameter) pairs: the name picks the random stream.
        lr: learning rate.   weight_decay: decoupled.   dist: "normal" or "rademacher", as the gradients were estimated.
        momentum: in [0, 1).   beta2: in [0, 1).
        update: "stochastic" rounds 16-bit weights stochastically, "exact" refuses them, "log" writes the first weights
            + u·Σ c·z over all steps so far, rounded once.
        per_layer: what is perturbed is w + ε·s·z, with s the root mean square of w before the first step over that of
            all trained entries, to the nearest power of two (1 for tensors of zeros). "variance": u = 1/s, so that the
            estimate's mean is the gradient, whatever s is; "expectation": u = 1, and its mean is s times the gradient.
            "none": s = u = 1.
        sparsity: the share of a tensor's entries, the largest at the start, that neither `perturbed` nor `step` touches
            as long as they are that large.
    Numerics: a in float64, c in float32, both on the device of the loss; the sum in float32, rounded once. bfloat16 and
        float16 weights are rounded stochastically: lr·a·z is mostly below half a unit in the last place, and rounding
        to nearest would drop it. A scalar that is NaN or Inf counts as 0, and is counted in `skipped`; one
        that is 0, where the loss is the same on both sides, in `flat`.
    State: `log`, 16 bytes a step, and once the names of each set of parameters that steps left out (a router's experts;
        it ends after 65,536 such sets); with beta2 one number; with update="log" a copy of the trained weights as they
        were when the optimizer was made, in host memory, and a step draws as many numbers for each weight as the log
        has different seeds: for short runs, and for `fedkseed`, which has k. `accumulate` collects the scalars of a
        step; `step` applies and forgets them. With torch.distributed they are averaged over the processes first.
    Raises: EfftuneError for settings that are out of range, 16-bit weights with update="exact" or weight decay, and
        weight decay with update="log".
    Source: Malladi et al. 2023, arXiv:2305.17333, algorithm 1, section 2.2, and appendix B (per_layer).
    """

    def __init__(
        self,
        params,
        lr: float = 1e-6,
        weight_decay: float = 0.0,
        dist: str = "normal",
        momentum: float = 0.0,
        beta2: float = 0.0,
        update: str = "stochastic",
        per_layer: str = "none",
        sparsity: float = 0.0,
    ):
        check(dist, momentum, beta2, update, per_layer, sparsity)
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        if any("param_names" not in group for group in self.param_groups):
            raise EfftuneError("ZerothOrderSGD draws by parameter name: give it (name, parameter) pairs.")
        short = next((n for n, p in self.named_parameters() if p.dtype.itemsize < 4), None)
        decays = any(group["weight_decay"] for group in self.param_groups)
        if short is not None and update == "exact":
            raise EfftuneError(
                f"update='exact' would lose most updates of {short}, which has 16 bits; use update='stochastic', or "
                "float32 weights."
            )
        if short is not None and decays:
            raise EfftuneError(
                f"Weight decay would be lost in {short}, which has 16 bits: (1 - lr·weight_decay)·w rounds to w; use "
                "weight_decay=0, or float32 weights."
            )
        if update == "log" and (decays or sparsity):
            raise EfftuneError(
                "With weight decay or sparsity a run is no sum over its directions, which update='log' is for; leave "
                "them out, or use update='stochastic'."
            )
        self.directions = Directions(self.named_parameters, dist, per_layer, sparsity)
        self.scalars = Scalars(beta2)
        self.momentum, self.update = momentum, update
        self.rounding = "stochastic" if update == "stochastic" else "nearest"
        self.start = {n: p.detach().to("cpu", copy=True) for n, p in self.named_parameters() if update == "log"}
        self.sums: dict[str, Sum] = {}  # of all steps, for update="log"; parameters with one history share theirs
        self.unwritten: set[str] = set()
        self.log, self.steps = SeedLog(), 0
        self.recent: dict[int, deque[list[Direction]]] = defaultdict(deque)  # group -> by step, the newest first
        self.base = ""  # fingerprint of the model before the first step

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return chain.from_iterable(self.named_groups())

    def named_groups(self) -> list[list[tuple[str, nn.Parameter]]]:
        return [list(zip(group["param_names"], group["params"], strict=True)) for group in self.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.scalars.pending.clear()
        self.scalars.losses.clear()
        self.directions.amounts.clear()

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pending = self.scalars.pending
        if not pending and any(p.grad is not None for _, p in self.named_parameters()):
            raise EfftuneError(
                "ZerothOrderSGD takes its gradients from tuner.backward(batch, loss_fn), not loss.backward()."
            )
        self.scalars.applied = {}
        if pending:
            found = self.scalars.take()
            for index, (group, named) in enumerate(zip(self.param_groups, self.named_groups(), strict=True)):
                c = (found * -group["lr"]).float()
                c = torch.where(c.isfinite(), c, 0.0)
                directions = [(seed, c[i], used) for i, (seed, (_, used)) in enumerate(pending.items())]
                decay = torch.tensor(1 - group["lr"] * group["weight_decay"], dtype=torch.float32, device="cpu")
                decay = decay.item()  # as the log has it
                used = frozenset().union(*(used for _, _, used in directions))
                self.log.append_step(self.steps, index, named, directions, decay, used)
                self._apply(index, directions, decay, used)
            self._write()
        pending.clear()
        self.directions.amounts.clear()
        self.steps += 1
        return loss

    def _apply(self, index: int, directions: list[Direction], decay: float, used: frozenset[int]) -> None:
        recent = self._recall(index, directions)
        weights = [self.momentum**age for age in range(len(recent))]  # 0 ** 0 is 1
        every = [(seed, c, w, ids) for w, step in zip(weights, recent, strict=True) for seed, c, ids in step]
        now = frozenset().union(*(ids for _, _, ids in directions))  # what is frozen today rests, whatever came before
        sets = list(dict.fromkeys(ids for *_, ids in every))  # mostly one
        chosen: dict[tuple, tuple[int, ...]] = {}  # of which sets a parameter is -> its directions
        made: dict[tuple, Tensor] = {}  # which directions, device -> their scalars
        sums: dict[tuple, Sum] = {}
        together: dict[tuple, list[tuple[Tensor, int, float | None]]] = defaultdict(list)  # what one call updates
        for name, p in self.named_groups()[index]:
            member = tuple([id(p) in now and id(p) in ids for ids in sets])
            if member not in chosen:
                yes = {ids for ids, is_in in zip(sets, member, strict=True) if is_in}
                chosen[member] = tuple(i for i, (*_, ids) in enumerate(every) if ids in yes)
            indices = chosen[member]
            decays = decay != 1 and id(p) in used
            if not indices and not decays:
                continue
            threshold = self.directions.threshold(name, p)  # of the weights before their first change
            if decays:
                p.mul_(decay)
            if not indices:
                continue
            key = indices, p.device, p.dtype == torch.float64
            if key not in made:
                there = every[indices[0]][1].device  # directions from a log are on the host
                scalars = torch.stack([(every[i][1] * every[i][2]).to(there) for i in indices])
                scalars = scalars.to(p.device, non_blocking=p.device.type != "cpu")
                made[key] = scalars.double() if p.dtype == torch.float64 else scalars
            if self.update == "log":
                seeds = [every[i][0] for i in indices]
                old = self.sums.get(name)
                if (id(old), key) not in sums:
                    sums[id(old), key] = plus(old, seeds, made[key])
                self.sums[name] = sums[id(old), key]
                self.unwritten.add(name)
            else:
                alike = key, self.directions.inverse_scale(name), p.dtype, p.is_contiguous()
                together[alike].append((p, stream_of(name), threshold))
        for (key, u, *_), rows in together.items():
            tensors, streams, thresholds = zip(*rows, strict=True)
            perturb_many_(
                tensors, made[key] * u, seed=[every[i][0] for i in key[0]], streams=streams,
                dist=self.directions.dist, rounding=self.rounding, thresholds=thresholds,
            )  # fmt: skip

    def _write(self) -> None:
        """Writes what `_apply` left in `sums` into the weights."""
        for name, p in self.named_parameters():
            if name in self.unwritten:
                seeds, sums = self.sums[name]
                self.directions.add(name, self.start[name].to(p.device), sums, seeds, self.rounding, out=p)
        self.unwritten.clear()

    @torch.no_grad()
    def replay(self, log: SeedLog) -> None:
        """Does to the parameters what the run did that wrote `log`: bit for bit on the same kind of device, and on any
        with ±1 draws and float32 weights; else up to the rounding of Gaussian draws."""
        self._apply_steps(log)
        self._write()

    def _apply_steps(self, log: SeedLog) -> None:
        for step, rows in log.by_step():
            for index, (directions, decay, used) in by_group(rows, self.named_groups()).items():
                self._apply(index, directions, decay, used)
            self.steps = step + 1

    @torch.no_grad()
    def replay_sums(self, log: SeedLog) -> None:
        """Like `replay`, every weight read and rounded once: Σ c · z over the different seeds of the log. Up to the
        rounding of the sums; K draws for each weight, however many steps the log has.

        Raises: EfftuneError for a log with weight decay, and with momentum or sparsity, where steps do not commute.
        """
        if self.momentum or self.directions.sparsity:
            raise EfftuneError("With momentum or sparsity the steps do not commute; replay them one by one.")
        for part, seeds, totals in log.sums():
            for name, p in self.named_groups()[part["group"]]:
                if name not in part["unused"] and seeds:
                    self.directions.add(name, p, torch.from_numpy(totals), seeds, self.rounding, out=p)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "zeroth_order": {
                "log": None if self.log.ended else self.log.state_dict(),
                "steps": self.steps,
                **{name: getattr(self.scalars, name) for name in Scalars.KEPT},
                "thresholds": dict(self.directions.thresholds),
                "scales": dict(self.directions.scales),
                "start": {name: checksum(tensor) for name, tensor in self.start.items()},
                "base": self.base,
            }
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["zeroth_order"]
        if saved["start"] != {name: checksum(tensor) for name, tensor in self.start.items()}:
            raise EfftuneError(
                "update='log' adds to the weights that the run began with, and these are others; make the optimizer "
                "before the trained weights are loaded."
            )
        if saved["log"] is None and (self.momentum or self.update == "log"):
            raise EfftuneError(
                "Momentum and update='log' go on from the seed log, and the run's had come to its end; resume without."
            )
        super().load_state_dict(state_dict)
        self.log.ended = saved["log"] is None
        if saved["log"] is not None:
            self.log.load_state_dict(saved["log"])
        self.directions.scales, self.directions.thresholds = dict(saved["scales"]), dict(saved["thresholds"])
        self.steps, self.base = saved["steps"], saved["base"]
        for name in Scalars.KEPT:
            setattr(self.scalars, name, saved[name])
        self.zero_grad()
        self.recent.clear()
        if self.update == "log":
            self.sums.clear()
            self._apply_steps(self.log)
            self.unwritten.clear()  # the weights come with the checkpoint
            return
        last = math.ceil(math.log(FORGOTTEN) / math.log(self.momentum)) + 1 if self.momentum else 0
        for _, rows in deque(self.log.by_step(), maxlen=last):
            for index, (directions, _, _) in by_group(rows, self.named_groups()).items():
                self._recall(index, directions)

    def _recall(self, index: int, directions: list[Direction]) -> deque[list[Direction]]:
        """Puts these directions in front of those of the group's recent steps, and returns all of them."""
        recent = self.recent[index]
        recent.appendleft(directions)
        while self.momentum ** (len(recent) - 1) < FORGOTTEN:
            recent.pop()
        return recent


def plus(old: Sum | None, seeds: list[int], a: Tensor) -> Sum:
    """Returns the sum with the scalars a (n,) of `seeds` added, by seed."""
    known, sums = ([], a.new_zeros(0, dtype=torch.float64)) if old is None else old
    place = {seed: i for i, seed in enumerate(known)}
    where = [place.setdefault(seed, len(place)) for seed in seeds]
    sums = torch.cat([sums, sums.new_zeros(len(place) - len(known))])
    return list(place), sums.index_add(0, torch.tensor(where, device=a.device), a.double())
