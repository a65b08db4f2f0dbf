"""SGD along random directions that are never stored: a seed and a scalar stand for a gradient."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, distributed, nn

from efftune.errors import EfftuneError
from efftune.ops.perturb import perturb, perturb_, perturb_many, perturb_many_
from efftune.optim.seed_log import DECAY, SeedLog, checksum

UPDATES = ("stochastic", "exact", "log")
PER_LAYER = ("none", "variance", "expectation")
Direction = tuple[int, Tensor, frozenset[int]]  # seed, scalar (), ids of the parameters that it is for
Sum = tuple[list[int], Tensor]  # seeds, and by seed the sum of its scalars (n,) float64
FORGOTTEN = 1e-3  # of a direction's first weight: with momentum, directions that weigh less are left out


def stream_of(name: str) -> int:
    """The random stream of a parameter: from its name, never from its position in a list."""
    return zlib.crc32(name.encode())


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
        self.dist, self.momentum, self.beta2, self.sparsity = dist, momentum, beta2, sparsity
        self.update, self.per_layer = update, per_layer
        self.rounding = "stochastic" if update == "stochastic" else "nearest"
        self.start = {n: p.detach().to("cpu", copy=True) for n, p in self.named_parameters() if update == "log"}
        self.sums: dict[str, Sum] = {}  # of all steps, for update="log"; parameters with one history share theirs
        self.unwritten: set[str] = set()
        self.scales: dict[str, float] = {}  # s, for per_layer
        self.pending: dict[int, tuple[Tensor, frozenset[int]]] = {}  # seed -> scalar (), ids of what it is for
        self.amounts: dict[tuple, Tensor] = {}  # of this step, what every layer's z is multiplied by
        self.applied: dict[int, Tensor] = {}  # seed -> scalar () of the last step, averaged over processes
        self.log, self.steps = SeedLog(), 0
        self.recent: dict[int, deque[list[Direction]]] = defaultdict(deque)  # group -> by step, the newest first
        self.losses: dict[int, Tensor] = {}  # of this step's directions, and the mean of the last step's: for one point
        self.previous: Tensor | None = None
        self.second: Tensor | None = None  # v, not corrected for its start, and of how many steps
        self.seen: Tensor | None = None
        self.directions = 0  # so far, of which these:
        self.skipped = self.flat = torch.zeros((), dtype=torch.int64, device="cpu")
        self.thresholds: dict[str, float | None] = {}
        self.base = ""  # fingerprint of the model before the first step

    def named(self, group: dict[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
        return zip(group["param_names"], group["params"], strict=True)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for group in self.param_groups:
            yield from self.named(group)

    def threshold(self, name: str, w: Tensor) -> float | None:
        """The largest |w_i| that trains, of the tensor as it was when first asked for: of its entries that are not zero
        if else it would be 0. None: all, as in a tensor of zeros (LoRA's B, biases), whose sizes say nothing yet."""
        if not self.sparsity:
            return None
        if name not in self.thresholds:
            sizes = w.detach().abs().flatten().float()
            share = 1 - self.sparsity
            self.thresholds[name] = smallest(sizes, share) or smallest(sizes[sizes > 0], share)
        return self.thresholds[name]

    def scale(self, name: str) -> float:
        """s of a parameter, from all that the optimizer has, as they are when it is first asked for."""
        if self.per_layer == "none":
            return 1.0
        if not self.scales:
            squares = {n: float(p.detach().double().square().sum()) for n, p in self.named_parameters()}
            counted = [p.numel() for n, p in self.named_parameters() if squares[n]]
            mean = sum(squares.values()) / max(1, sum(counted))
            for n, p in self.named_parameters():
                self.scales[n] = 2.0 ** round(math.log2(squares[n] / p.numel() / mean) / 2) if squares[n] else 1.0
        return self.scales[name]

    def perturbed(self, names: Sequence[str], w: Sequence[Tensor], eps: float, seed: int) -> list[Tensor]:
        """w + eps·s·z in new tensors, those that are alike by one call."""
        together: dict[tuple, list[int]] = defaultdict(list)
        for i, (name, t) in enumerate(zip(names, w, strict=True)):
            together[self.scale(name), t.dtype, t.device].append(i)
        made: list[Tensor] = list(w)
        for (scale, dtype, device), at in together.items():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            key = eps * scale, wide, device
            if key not in self.amounts:
                self.amounts[key] = torch.full((), eps * scale, dtype=wide, device=device)
            new = perturb_many(
                [w[i] for i in at], self.amounts[key], seed=seed, streams=[stream_of(names[i]) for i in at],
                dist=self.dist, thresholds=[self.threshold(names[i], w[i]) for i in at],
            )  # fmt: skip
            if len(at) == len(w):
                return new
            for i, t in zip(at, new, strict=True):
                made[i] = t
        return made

    def estimate(self, name: str, w: Tensor, scalars: Mapping[int, float]) -> Tensor:
        """u · Σ a·z over `scalars` (a by seed), in float32 (float64 for such weights), 0 for the entries that rest."""
        zero = torch.zeros(w.shape, dtype=torch.float64 if w.dtype == torch.float64 else torch.float32, device=w.device)
        a = torch.tensor(list(scalars.values()), dtype=zero.dtype, device=w.device) * self.unscaled(name)
        made = perturb(zero, a, seed=list(scalars), stream=stream_of(name), dist=self.dist)
        threshold = self.threshold(name, w)
        return made if threshold is None else torch.where(w.abs() <= threshold, made, 0.0)

    def accumulate(self, seed: int, a: Tensor | float, used: Set[int]) -> None:
        """Adds a·z(seed) to the step's gradient for the parameters whose id is in `used`."""
        a = a.double() if isinstance(a, Tensor) else torch.tensor(a, dtype=torch.float64, device="cpu")
        if seed in self.pending:
            a, used = a + self.pending[seed][0], set(self.pending[seed][1] | used)
        self.pending[seed] = a, frozenset(used)

    def look(self, index: int, loss: Tensor) -> Tensor:
        """What one point has for a difference, of a micro-batch's `loss` () along the step's direction `index`. Over
        micro-batches it adds up to the step's loss minus the mean of the last step's, and to 0 while there is none.
        Those do not depend on today's directions, so that whatever they are, the gradient has no bias."""
        first = index not in self.losses
        self.losses[index] = loss if first else self.losses[index] + loss
        if self.previous is None:
            return torch.zeros_like(loss)
        return loss - self.previous.to(loss.device) if first else loss

    def remember(self) -> None:
        """The step's losses are now the last step's."""
        if self.losses:
            mean = torch.stack(list(self.losses.values())).mean()
            self.previous = mean if self.previous is None else torch.where(mean.isfinite(), mean, self.previous)
            self.losses.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.pending.clear()
        self.losses.clear()
        self.amounts.clear()

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.pending and any(p.grad is not None for _, p in self.named_parameters()):
            raise EfftuneError(
                "ZerothOrderSGD takes its gradients from tuner.backward(batch, loss_fn), not loss.backward()."
            )
        self.applied = {}
        if self.pending:
            found = self._scalars()
            for index, group in enumerate(self.param_groups):
                c = (found * -group["lr"]).float()
                c = torch.where(c.isfinite(), c, 0.0)
                directions = [(seed, c[i], used) for i, (seed, (_, used)) in enumerate(self.pending.items())]
                decay = torch.tensor(1 - group["lr"] * group["weight_decay"], dtype=torch.float32, device="cpu")
                decay = decay.item()  # as the log has it
                used = frozenset().union(*(used for _, _, used in directions))
                for seed, scalar, ids in (
                    directions if decay == 1 else [(DECAY, c.new_tensor(decay), used), *directions]
                ):
                    unused = [name for name, p in self.named(group) if id(p) not in ids]
                    self.log.append(self.steps, seed, scalar, index, unused)
                self._apply(index, directions, decay, used)
            self._write()
        self.pending.clear()
        self.amounts.clear()
        self.steps += 1
        return loss

    def _scalars(self) -> Tensor:
        """(n,) float64: a / √v of the step's directions, averaged over processes, 0 where it is not finite."""
        a = average(torch.stack([a for a, _ in self.pending.values()]))
        self.applied = dict(zip(self.pending, a.unbind(), strict=True))
        self.directions += len(a)
        for key in ("second", "seen", "previous", "skipped", "flat"):  # of a checkpoint: where the losses are now
            if (value := getattr(self, key)) is not None:
                setattr(self, key, value.to(a.device))
        if not self.losses or self.previous is not None:  # the first look of one point has nothing to differ from
            self.flat = self.flat + (a == 0).sum()
        self.remember()
        finite = a.isfinite()
        self.skipped = self.skipped + (~finite).sum()
        a = torch.where(finite, a, 0.0)
        if self.beta2:
            second, seen = (a.new_zeros(()) if t is None else t for t in (self.second, self.seen))
            square, tells = a.square().sum() / finite.sum().clamp_min(1), a.any()  # nothing: skipped, or a first look
            self.second = torch.where(tells, (1 - self.beta2) * square + self.beta2 * second, second)
            self.seen = seen + tells
            a = a / ((self.second / (1 - self.beta2 ** self.seen.clamp_min(1))).sqrt() + 1e-8)
        return a

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
        for name, p in self.named(self.param_groups[index]):
            member = tuple([id(p) in now and id(p) in ids for ids in sets])
            if member not in chosen:
                yes = {ids for ids, is_in in zip(sets, member, strict=True) if is_in}
                chosen[member] = tuple(i for i, (*_, ids) in enumerate(every) if ids in yes)
            mine = chosen[member]
            decays = decay != 1 and id(p) in used
            if not mine and not decays:
                continue
            threshold = self.threshold(name, p)  # of the weights before their first change
            if decays:
                p.mul_(decay)
            if not mine:
                continue
            key = mine, p.device, p.dtype == torch.float64
            if key not in made:
                there = every[mine[0]][1].device  # directions from a log are on the host
                scalars = torch.stack([(every[i][1] * every[i][2]).to(there) for i in mine])
                scalars = scalars.to(p.device, non_blocking=p.device.type != "cpu")
                made[key] = scalars.double() if p.dtype == torch.float64 else scalars
            if self.update == "log":
                seeds = [every[i][0] for i in mine]
                old = self.sums.get(name)
                if (id(old), key) not in sums:
                    sums[id(old), key] = plus(old, seeds, made[key])
                self.sums[name] = sums[id(old), key]
                self.unwritten.add(name)
            else:
                alike = key, self.unscaled(name), p.dtype, p.is_contiguous()
                together[alike].append((p, stream_of(name), threshold))
        for (key, unscaled, *_), rows in together.items():
            tensors, streams, thresholds = zip(*rows, strict=True)
            perturb_many_(
                tensors, made[key] * unscaled, seed=[every[i][0] for i in key[0]], streams=streams, dist=self.dist,
                rounding=self.rounding, thresholds=thresholds,
            )  # fmt: skip

    def unscaled(self, name: str) -> float:
        """u of a parameter."""
        scale = self.scale(name)
        return 1 / scale if self.per_layer == "variance" else 1.0

    def _write(self) -> None:
        """What `_apply` left in `sums`, into the weights."""
        for name, p in self.named_parameters():
            if name in self.unwritten:
                seeds, sums = self.sums[name]
                a = sums.to(p.device, p.dtype if p.dtype == torch.float64 else torch.float32) * self.unscaled(name)
                base = self.start[name].to(p.device)
                perturb(base, a, seed=seeds, stream=stream_of(name), dist=self.dist, rounding=self.rounding, out=p)
        self.unwritten.clear()

    @torch.no_grad()
    def replay(self, log: SeedLog) -> None:
        """Does to the parameters what the run did that wrote `log`: bit for bit on the same kind of device, and on any
        with ±1 draws and float32 weights; else up to the rounding of Gaussian draws."""
        for step, rows in log.by_step():
            for index, (directions, decay, used) in self._of_groups(rows).items():
                self._apply(index, directions, decay, used)
            self.steps = step + 1
        self._write()

    @torch.no_grad()
    def replay_sums(self, log: SeedLog) -> None:
        """Like `replay`, every weight read and rounded once: Σ c · z over the different seeds of the log. Up to the
        rounding of the sums; K draws for each weight, however many steps the log has.

        Raises: EfftuneError for a log with weight decay, and with momentum or sparsity, where steps do not commute.
        """
        if self.momentum or self.sparsity:
            raise EfftuneError("With momentum or sparsity the steps do not commute; replay them one by one.")
        for part, seeds, totals in log.sums():
            for name, p in self.named(self.param_groups[part["group"]]):
                if name not in part["unused"] and seeds:
                    a = torch.from_numpy(totals).to(p.device, torch.float64 if p.dtype == torch.float64 else None)
                    a = a * self.unscaled(name)
                    perturb_(p, a, seed=seeds, stream=stream_of(name), dist=self.dist, rounding=self.rounding)

    def _of_groups(self, rows) -> dict[int, tuple[list[Direction], float, frozenset[int]]]:
        """One step of a log -> group -> its directions, its decay and what that is for. Raises: EfftuneError for a log
        of other groups than there are."""
        groups: dict[int, tuple[list[Direction], float, frozenset[int]]] = {}
        for part, seed, scalar in rows:
            index = part["group"]
            if index >= len(self.param_groups):
                raise EfftuneError(
                    f"The log is of {index + 1} groups of parameters or more, not {len(self.param_groups)}."
                )
            unused = set(part["unused"])
            used = frozenset(id(p) for n, p in self.named(self.param_groups[index]) if n not in unused)
            directions, decay, decayed = groups.get(index, ([], 1.0, frozenset()))
            if seed == DECAY:
                groups[index] = directions, scalar, used
            else:
                c = torch.tensor(scalar, dtype=torch.float32, device="cpu")
                groups[index] = [*directions, (seed, c, used)], decay, decayed
        return groups

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "zeroth_order": {
                "log": None if self.log.ended else self.log.state_dict(),
                "steps": self.steps,
                "second": self.second,
                "seen": self.seen,
                "previous": self.previous,
                "directions": self.directions,
                "skipped": self.skipped,
                "flat": self.flat,
                "thresholds": dict(self.thresholds),
                "scales": dict(self.scales),
                "start": {name: checksum(tensor) for name, tensor in self.start.items()},
                "base": self.base,
            }
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = state_dict["zeroth_order"]
        if own["start"] != {name: checksum(tensor) for name, tensor in self.start.items()}:
            raise EfftuneError(
                "update='log' adds to the weights that the run began with, and these are others; make the optimizer "
                "before the trained weights are loaded."
            )
        if own["log"] is None and (self.momentum or self.update == "log"):
            raise EfftuneError(
                "Momentum and update='log' go on from the seed log, and the run's had come to its end; resume without."
            )
        super().load_state_dict(state_dict)
        self.log.ended = own["log"] is None
        if own["log"] is not None:
            self.log.load_state_dict(own["log"])
        self.scales = dict(own["scales"])
        self.steps, self.thresholds, self.base = own["steps"], dict(own["thresholds"]), own["base"]
        for key in ("second", "seen", "previous", "directions", "skipped", "flat"):
            setattr(self, key, own[key])
        self.zero_grad()
        self.recent.clear()
        if self.update == "log":
            self.sums.clear()
            for _, rows in self.log.by_step():
                for index, (directions, decay, used) in self._of_groups(rows).items():
                    self._apply(index, directions, decay, used)
            self.unwritten.clear()  # the weights come with the checkpoint
            return
        last = math.ceil(math.log(FORGOTTEN) / math.log(self.momentum)) + 1 if self.momentum else 0
        for _, rows in deque(self.log.by_step(), maxlen=last):
            for index, (directions, _, _) in self._of_groups(rows).items():
                self._recall(index, directions)

    def _recall(self, index: int, directions: list[Direction]) -> deque[list[Direction]]:
        """The directions of the group's recent steps, with these in front."""
        recent = self.recent[index]
        recent.appendleft(directions)
        while self.momentum ** (len(recent) - 1) < FORGOTTEN:
            recent.pop()
        return recent


def smallest(sizes: Tensor, share: float) -> float | None:
    """The largest of the `share` smallest of sizes (n,); None where there are none."""
    return float(sizes.kthvalue(max(1, round(share * len(sizes)))).values) if len(sizes) else None


def plus(old: Sum | None, seeds: list[int], a: Tensor) -> Sum:
    """The sum with a (n,) added, by seed."""
    known, sums = ([], a.new_zeros(0, dtype=torch.float64)) if old is None else old
    place = {seed: i for i, seed in enumerate(known)}
    where = [place.setdefault(seed, len(place)) for seed in seeds]
    sums = torch.cat([sums, sums.new_zeros(len(place) - len(known))])
    return list(place), sums.index_add(0, torch.tensor(where, device=a.device), a.double())


def average(a: Tensor) -> Tensor:
    """The mean over the processes of torch.distributed, if there are any: all that they exchange."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return a
    a = a.clone()
    distributed.all_reduce(a)
    return a / distributed.get_world_size()
