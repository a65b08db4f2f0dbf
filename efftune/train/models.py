"""Hugging Face models and tokenizers, loaded from safetensors only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from efftune.errors import EfftuneError
from efftune.files import refuse_pickle
from efftune.modes import evaluation_mode
from efftune.versions import require


@contextmanager
def quiet() -> Iterator[None]:
    """Switches off the libraries' progress bars and their notes on new heads within the block; what matters in these is
    checked by us."""
    require("torch", "transformers")
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def check_folder(name: str) -> None:
    """Raises: EfftuneError for a path that is no folder, or a folder whose weights are pickles."""
    folder = Path(name)
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            refuse_pickle(folder / "model.safetensors")
    elif folder.exists() or name.startswith((".", "/", "~")):
        raise EfftuneError(f"--model {name} is not a folder; give a model's folder or its Hugging Face name.")


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise EfftuneError(f"{name} has no tokenizer that can be loaded ({_first_line(error)}).") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise EfftuneError(
                f"{name}: the tokenizer has neither a padding nor an end token; set one (tokenizer.pad_token = ...) "
                "and save it with tokenizer.save_pretrained."
            )
        # padding is told by position and mask, never by token, so the end token can stand in for it
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, dtype: str, labels: list[str] | None, pad_id: int) -> tuple[nn.Module, list[str]]:
    """(model, names of parameters that its file does not hold, such as a new classification head).

    Args:
        dtype: "bf16" stores the weights in bfloat16, anything else in float32.
        labels: class names for sequence classification, or None for a causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": torch.bfloat16 if dtype == "bf16" else torch.float32, "use_safetensors": True}
    kind: Any = AutoModelForCausalLM
    if labels is not None:
        kind = AutoModelForSequenceClassification
        options |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        options |= {"label2id": {label: i for i, label in enumerate(labels)}, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            model, report = kind.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise EfftuneError(f"--model {name} cannot be loaded as {kind.__name__} ({_first_line(error)}).") from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_id  # sequence classification finds the last token by it
    new = {*report["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"])}
    if labels is None and new:
        raise EfftuneError(f"--model {name} has no weights for {sorted(new)[0]}: it is not a causal language model.")
    return model, sorted(new)


def longest_sequence(model: nn.Module) -> int | None:
    return getattr(model.config, "max_position_embeddings", None)


def sampler(tokenizer: Any, prompt_ids: list[int], tokens: int, seed: int) -> Callable[[nn.Module], str]:
    """Returns a function from the model to the prompt and its continuation, drawn with a generator state of its own."""

    @torch.no_grad()
    def sample(model: Any) -> str:
        ids = torch.tensor([prompt_ids], device=next(model.parameters()).device)
        with evaluation_mode(model), torch.random.fork_rng(), quiet():
            torch.manual_seed(seed)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, max_new_tokens=tokens,
                do_sample=True, temperature=0.8, top_k=50,
            )  # fmt: skip
        return tokenizer.decode(out[0], skip_special_tokens=True)

    return sample


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
