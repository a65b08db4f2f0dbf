"""What `efftune train` does with nothing else: a small Llama on text that every CPython carries.

A BPE tokenizer and a model of 5.2 M parameters are trained on the sources of the standard library and cached; the
fine-tuning text is the language reference (`pydoc_data/topics.py`), English prose that the model has not seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from efftune.errors import EfftuneError
from efftune.random_state import set_seed
from efftune.train.loop import learning_rate_factor
from efftune.train.meter import Progress
from efftune.train.models import quiet
from efftune.train.threads import use_faster

SETTINGS = {
    "recipe": "lora(r=16)", "seq_len": 256, "batch_size": 8, "epochs": 3.0, "lr": 8e-3, "eval_every": 60,
    "sample_prompt": "The try statement",
}  # fmt: skip
ZEROTH_ORDER_RATE = 1e-3  # largest stable rate falls with the number of parameters, and this model has few
VOCABULARY = 4096
MODEL = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    # transformers' default, 0.02, is meant for wide models
    "initializer_range": 0.06,
}  # fmt: skip
PRETRAINING = {"steps": 280, "rows": 8, "tokens": 256, "lr": 3e-3, "warmup": 14, "weight_decay": 0.1, "seed": 0}
HELD_OUT = 0.1  # of the text, in whole topics
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "ensurepip",
    "turtledemo",
}
END, PAD = "<|end|>", "<|pad|>"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "efftune"


def cached(kind: str, key: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, once for each `key`: under another name first, so that it is whole or not there."""
    code = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    final = cache_folder() / f"{kind}-{code}"
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=final.parent))
        try:
            make(temporary)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if final.is_dir():  # another process was first
            return final
        raise EfftuneError(
            f"{final} cannot be written ({error.strerror or error}); free some space or set XDG_CACHE_HOME."
        ) from error
    return final


def sources() -> list[str]:
    """The standard library's modules, in a fixed order, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]
    if not paths:
        raise EfftuneError(f"{root} holds no sources to train the small model on; give --model and --data.")
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def prose() -> tuple[Path, Path]:
    """(training, held out) JSONL files with one topic of the language reference in a line."""
    from pydoc_data.topics import topics

    def make(folder: Path) -> None:
        names = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
        size = sum(map(len, topics.values()))
        count = next(n for n in range(len(names)) if sum(len(topics[name]) for name in names[:n]) >= HELD_OUT * size)
        for file, chosen in (("held_out", names[:count]), ("train", names[count:])):
            lines = (json.dumps({"text": topics[name]}) + "\n" for name in chosen)
            (folder / f"{file}.jsonl").write_text("".join(lines))

    folder = cached("prose", {"topics": topics, "held_out": HELD_OUT}, make)
    return folder / "train.jsonl", folder / "held_out.jsonl"


def small_model() -> Path:
    """Folder of the pre-trained small model and its tokenizer, in Hugging Face's layout."""
    key = {"python": sys.version, "model": MODEL, "pretraining": PRETRAINING, "left_out": sorted(LEFT_OUT)}

    def make(folder: Path) -> None:
        print(
            f"Pre-training a small model on the standard library's sources, some two minutes (once; kept in "
            f"{cache_folder()}). First its tokenizer:",
            flush=True,
        )
        texts = sources()
        tokenizer = train_tokenizer(texts)
        with quiet():
            tokenizer.save_pretrained(folder)
            pretrain(texts, tokenizer).save_pretrained(folder)

    return cached("small-llama", key, make)


def train_tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def pretrain(texts: list[str], tokenizer: Any) -> Any:
    """A fixed number of steps on windows of all texts that the seed draws."""
    from transformers import LlamaConfig, LlamaForCausalLM

    p = PRETRAINING
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids += [*encoding.ids, end]
    stream = torch.tensor(ids)
    set_seed(p["seed"])
    model: Any = LlamaForCausalLM(
        LlamaConfig(**MODEL, bos_token_id=end, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    )
    optimizer = torch.optim.AdamW(model.parameters(), p["lr"], betas=(0.9, 0.99), weight_decay=p["weight_decay"])
    factor = learning_rate_factor("cosine", p["warmup"], p["steps"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(p["seed"])

    def forward() -> torch.Tensor:
        starts: Any = torch.randint(len(stream) - p["tokens"], (p["rows"],), generator=generator)
        rows = torch.stack([stream[s : s + p["tokens"]] for s in starts])
        return model(input_ids=rows, labels=rows, use_cache=False).loss

    drawn, threads = generator.get_state(), torch.get_num_threads()
    with torch.no_grad():
        use_faster(forward)
    generator.set_state(drawn)
    with Progress(p["steps"], what="pre-train") as progress:
        for _ in range(p["steps"]):
            started = time.perf_counter()
            loss = forward()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr = scheduler.get_last_lr()[0]
            scheduler.step()
            count = p["rows"] * p["tokens"]
            rate = count / (time.perf_counter() - started)
            progress.update({"loss": loss.item(), "lr": lr, "tokens": count, "tokens_per_s": rate})
    torch.set_num_threads(threads)
    return model
