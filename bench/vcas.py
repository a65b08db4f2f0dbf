"""One transformer block, forward + backward on a part of the batch: how much of the arithmetic saved is time saved.

python -m bench.vcas [--device cpu|cuda] [--dtypes float32,bfloat16] [--repeats N]

The control is the same recompute with all samples (ratio 1), which is checkpointing. A share ρ of the samples saves
3(1 − ρ) of the 4 forwards that checkpointing costs; the lines printed first divide the time saved by that.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.harness import Job, kind, measure, parsed, parser, run
from efftune.nn.subbatch import install
from efftune.ops._available import dtype_name

RATIOS = (1.0, 0.5, 0.25)


def bert(dropout: float, large: bool) -> tuple[nn.Module, tuple[int, int, int], dict]:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    sizes = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16) if large else {}
    config = BertConfig(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **sizes)
    config._attn_implementation = "sdpa"
    return BertLayer(config), ((64, 512) if large else (16, 128)) + (config.hidden_size,), {}


def llama(large: bool) -> tuple[nn.Module, tuple[int, int, int], dict]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    d, f, heads, shared = (4096, 14336, 32, 8) if large else (1024, 2816, 16, 4)
    config = LlamaConfig(
        hidden_size=d, intermediate_size=f, num_attention_heads=heads, num_key_value_heads=shared, head_dim=d // heads
    )
    config._attn_implementation = "sdpa"
    shape = ((8, 2048) if large else (8, 256)) + (d,)
    positions = torch.arange(shape[1])[None]
    return LlamaDecoderLayer(config, 0), shape, {"rotary": LlamaRotaryEmbedding(config), "position_ids": positions}


def rows_for(name: str, made, device: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    block, shape, kwargs = made
    block = block.to(device, dtype).train()
    x = torch.randn(shape, device=device, dtype=dtype)
    # Gradients of very different norms, as samples have: the lighter half carries a tenth.
    dy = (
        torch.randn(shape, device=device, dtype=dtype)
        * torch.logspace(-2, 0, shape[0], device=device).to(dtype)[:, None, None]
    )
    if "rotary" in kwargs:
        positions = kwargs["position_ids"].to(device)
        kwargs = {"position_ids": positions, "position_embeddings": kwargs["rotary"].to(device)(x, positions)}

    def step(call):
        def timed():
            leaf = x.detach().requires_grad_()
            call(leaf).backward(dy)
            block.zero_grad(set_to_none=True)

        return timed

    def at(ratio):
        def call(leaf):
            recompute.ratio = ratio
            return block(leaf, **kwargs)

        return call

    recompute = install(block, 1.0)
    plain = recompute.forward
    variants = {"checkpointing (ours, all samples)": step(at(1.0))}
    variants |= {f"samples x {ratio}": step(at(ratio)) for ratio in RATIOS if ratio < 1}
    variants["torch checkpoint"] = step(lambda leaf: checkpoint(plain, leaf, use_reentrant=False, **kwargs))
    variants["keep everything"] = step(lambda leaf: plain(leaf, **kwargs))
    title = f"{name} {dtype_name(dtype)}"
    return run(title, variants, device=device, dtype=dtype, repeats=repeats)


def realised(rows: list[dict]) -> list[tuple[str, float, float]]:
    """(block, ratio, time saved ÷ arithmetic saved) against the ratio-1 control: the median over paired repeats."""
    if any("skipped" in row for row in rows):
        return []
    (control,) = (r["samples_s"] for r in rows if r["variant"].endswith("all samples)"))
    found = []
    for row in rows:
        if row["variant"].startswith("samples x"):
            ratio = float(row["variant"].split()[-1])
            saved = statistics.median(1 - part / whole for part, whole in zip(row["samples_s"], control, strict=True))
            row["time_over_arithmetic_saved"] = saved / (0.75 * (1 - ratio))
            found.append((row["name"], ratio, row["time_over_arithmetic_saved"]))
    return found


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, default=15)
    made.add_argument("--dtypes", help="[float32,bfloat16 on a CPU, bfloat16 on a GPU]")
    args = parsed(made, argv)
    torch.manual_seed(0)
    large = kind(args.device) == "cuda"  # on small blocks a GPU waits for the host, and what is saved is not time
    bert_name, llama_name = (
        ("BERT-large 64x512", "Llama d4096 8x2048") if large else ("BERT-base 16x128", "Llama d1024 8x256")
    )
    blocks = {
        bert_name: partial(bert, 0.0, large),
        f"{bert_name}, dropout 0.1": partial(bert, 0.1, large),
        llama_name: partial(llama, large),
    }

    def job(name: str, dtype: torch.dtype) -> list[dict]:
        rows = rows_for(name, blocks[name](), args.device, dtype, args.repeats)
        for title, ratio, value in realised(rows):
            print(f"{title:42}  samples x {ratio:<5} time saved / arithmetic saved {value:5.2f}", flush=True)
        return rows

    jobs = [
        Job(f"{name} {dtype}", partial(job, name, getattr(torch, dtype)))
        for dtype in (args.dtypes or ("bfloat16" if large else "float32,bfloat16")).split(",")
        for name in blocks
    ]
    measure(args, "vcas", jobs)


if __name__ == "__main__":
    main()
