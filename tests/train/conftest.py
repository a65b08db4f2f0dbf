"""Tiny models and data, made on the spot."""

import json

import pytest
import torch

import efftune
from efftune.train.batches import Data, collate_packed
from efftune.train.config import TrainConfig
from efftune.train.data import Example
from efftune.train.loop import Trainer
from efftune.train.rundir import RunDir
from efftune.train.task import CAUSAL_LM

WORDS = "the a cat dog sat ran on under mat tree and slept red blue one two three is not it".split()


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>", "<pad>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def llama(seed=0, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if not isinstance(content, str):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(content)
        return path

    return write


def examples(count=24, low=3, high=14, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = int(torch.randint(low, high, (1,), generator=generator))
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        made.append(Example(i, ids, [-100, *ids[1:]], i))
    return made


def packed(count=24, seed=0, row_tokens=32):
    return Data(examples(count), collate_packed(1), seed, row_tokens)


def trainer(recipe="lora(r=4)", run=None, model=None, data=None, task=CAUSAL_LM, **changes):
    """A trainer of a tiny Llama on random tokens, without evaluation."""
    settings = {"steps": 8, "batch_size": 2, "lr": 1e-2, "save_every": 3, "keep_last": 3, "warmup": 2}
    model = model or llama()
    torch.manual_seed(7)
    tuner = efftune.apply(model, recipe)
    run_dir = RunDir(run, changes.pop("resumed", False)) if run else None
    if run:
        run.mkdir(exist_ok=True)
    return Trainer(tuner, TrainConfig(**settings | changes), data or packed(), task=task, run=run_dir)
