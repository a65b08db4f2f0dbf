"""A layer of which a few entries or columns train, forward + backward, against the frozen linear, the whole weight,
a LoRA of rank 16, and PEFT's SHiRA of as many entries: time and peak memory; then with a step of AdamW. Entries over
8-bit weights and over weights that cannot be written to are among them. At last, steps of whole models.

python -m bench.sparse [--device cpu|cuda]
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

import efftune
from bench.harness import Job, dtypes, measure, parsed, parser, print_table, run
from efftune import Linear
from efftune.linear import Dense, Int8, LoRA, Trained
from efftune.linear.delta.columns import Columns
from efftune.linear.delta.entries import Entries
from efftune.linear.picks import choose, repick
from efftune.ops._available import dtype_name

RANKS = {"0.1 %": 1, "1 %": 10, "5 %": 51}  # r·(N + K) entries, of 2048 x 2048


def with_peft(linear: nn.Linear, r: int) -> nn.Module:
    from peft import ShiraConfig, get_peft_model

    model = nn.Sequential(copy.deepcopy(linear))
    return get_peft_model(model, ShiraConfig(r=r, target_modules=["0"], random_seed=0)).base_model.model[0]


def layers(linear: nn.Linear) -> dict[str, nn.Module]:
    n, k = linear.weight.shape
    draw = torch.Generator().manual_seed(0)
    made: dict[str, nn.Module] = {
        "frozen linear": linear,
        "full": Linear.from_linear(copy.deepcopy(linear).requires_grad_(True), delta=Trained()),
        "LoRA r 16": Linear.from_linear(linear, delta=LoRA(r=16)),
    }
    for share, r in RANKS.items():
        layer = made[f"{share} of entries"] = Linear.from_linear(copy.deepcopy(linear), delta=Entries(r=r))
        repick(layer, torch.randperm(n * k, generator=draw)[: len(layer.indices)].sort().values)
        made[f"PEFT's SHiRA, {share}"] = with_peft(linear, r)
    for share, count in {"1 %": round(0.01 * k), "5 %": round(0.05 * k)}.items():
        layer = made[f"{share} of columns"] = Linear.from_linear(copy.deepcopy(linear), delta=Columns(count))
        choose(layer, torch.randperm(k, generator=draw)[:count].sort().values)
    made["frozen, 8 bits"] = Linear.from_linear(copy.deepcopy(linear), base=Int8())
    made["LoRA r 16, 8 bits"] = Linear.from_linear(copy.deepcopy(linear), base=Int8(), delta=LoRA(r=16))
    for base, what in ((Int8(), "8 bits"), (Dense(), "not written to")):
        delta = Entries(r=RANKS["1 %"]).beside()
        layer = made[f"1 % of entries, {what}"] = Linear.from_linear(copy.deepcopy(linear), base=base, delta=delta)
        repick(layer, torch.randperm(n * k, generator=draw)[: len(layer.indices)].sort().values)
    return made


MODELS = {  # hidden size, MLP, layers, vocabulary; samples of 256 tokens
    "d 256, 4 layers, MLP 1024": ((256, 1024, 4, 4096), 8),
    "d 512, 4 layers, MLP 1408": ((512, 1408, 4, 4096), 4),
}
RECIPES = "full", "lora(r=16)", "s2ft(ratio=0.03)", "shira(density=0.01)"


def model_rows(device: str, dtype: torch.dtype, name: str, repeats: int) -> list[dict]:
    """A step with AdamW: forward, backward, update."""
    from transformers import LlamaConfig, LlamaForCausalLM

    (d, mlp, layers, vocabulary), samples = MODELS[name]
    config = LlamaConfig(
        hidden_size=d, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=d // 64,
        num_key_value_heads=d // 64, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    ids = torch.randint(vocabulary, (samples, 256), device=device)
    batch = {"input_ids": ids, "labels": ids}

    def step(recipe: str):
        tuner = efftune.apply(LlamaForCausalLM(config).to(device, dtype), recipe)
        optimizer = tuner.optimizer(lr=1e-5)
        tuner.model.train()

        def call():
            tuner.backward(batch, lambda model, batch: model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

        return call

    title = f"step, {name}, {dtype_name(dtype)}, {samples} x 256 tokens"
    return run(title, {r: step(r) for r in RECIPES}, device=device, dtype=dtype, repeats=repeats)


def rows(device: str, dtype: torch.dtype, m: int, n: int, k: int, repeats: int, adamw: bool) -> list[dict]:
    linear = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(m, n, device=device, dtype=dtype)

    def step(layer):
        trained = [p for p in layer.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if adamw and trained else None

        def call():
            layer(x).backward(dy)
            if optimizer is not None:
                optimizer.step()
            for leaf in (x, *trained):
                leaf.grad = None

        return call

    name = f"{dtype_name(dtype)} {m}x{n}x{k}{', with AdamW' * adamw}"
    return run(
        name, {label: step(layer) for label, layer in layers(linear).items()}, device=device, dtype=dtype,
        repeats=repeats,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parsed(parser(__doc__), argv)
    if args.device == "cpu":
        shapes = [(dtype, 2048, 2048, 2048, 7) for dtype in dtypes("cpu")]
    else:
        shapes = [(torch.bfloat16, m, n, k, 30) for m, n, k in ((8192, 4096, 4096), (2048, 4096, 4096))]
    jobs = [
        Job(f"{dtype_name(dtype)} {rest} {adamw}", partial(rows, args.device, dtype, *rest, adamw))
        for dtype, *rest in shapes
        for adamw in (False, True)
    ]
    models = {torch.float32: "d 256, 4 layers, MLP 1024", torch.bfloat16: "d 512, 4 layers, MLP 1408"}
    for dtype in dtypes("cpu") if args.device == "cpu" else [torch.bfloat16]:
        name = models[dtype]
        jobs.append(Job(f"step {name} {dtype_name(dtype)}", partial(model_rows, args.device, dtype, name, 7)))
    measure(args, "sparse", jobs, print_table)


if __name__ == "__main__":
    main()
