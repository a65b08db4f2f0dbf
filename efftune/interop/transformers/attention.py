"""The attention of transformers' models that run with attn_implementation="sdpa", routed through ours."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch

from efftune.nn.attention import KEEP, attend, why_not

KNOWN = ("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal")
_original: Any = None
_more: frozenset[str] = frozenset()  # what it takes by name beside what `for_transformers` does: a position bias
_OTHER = frozenset(["position_bias", "cache", "softcap", "s_aux"])  # what is for other kernels than sdpa


def register() -> None:
    """Puts a switch in front of transformers' sdpa: modules with a `KEEP` get `attention`, all others what they had.
    The model's config goes on to say "sdpa", which some models compare with."""
    global _original, _more
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _original is None:
        _original = ALL_ATTENTION_FUNCTIONS["sdpa"]
        named = (p.name for p in inspect.signature(_original).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD)
        _more = frozenset(name for name in named if name not in KNOWN)
        ALL_ATTENTION_FUNCTIONS.register("sdpa", _switch)


def _switch(module: Any, *args, **kwargs):
    return (for_transformers if hasattr(module, KEEP) else _original)(module, *args, **kwargs)


def for_transformers(module: Any, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **rest):
    """Computes attention with the arguments of transformers' attention interface. What `attention` cannot do goes to
    transformers' own sdpa."""
    q, k, v = query, key, value
    device = "cpu" if q.is_cpu else q.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        q, k, v = (t.to(torch.get_autocast_dtype(device)) for t in (q, k, v))
    other = any([rest[name] is not None for name in rest if name in _more or name in _OTHER])
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    whole = q.shape[2] == k.shape[2] or attention_mask is not None
    if other or not whole or why_not(q, k, v, attention_mask, dropout) is not None:
        return _original(module, query, key, value, attention_mask, dropout, scaling, is_causal, **rest)
    causal = bool(causal) and attention_mask is None and q.shape[2] > 1
    keep = getattr(module, KEEP, None)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():  # torch's costs 4 µs
        out = attend(q, k, v, attention_mask, causal, scaling, dropout, keep)
    return out.transpose(1, 2), None
