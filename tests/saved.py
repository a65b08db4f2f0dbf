"""Bytes that autograd saves, once per storage, parameters and buffers apart."""

import torch


def saved_bytes(forward, model) -> int:
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()  # alive until counted: a freed storage's address could come again
    return sum(storages.values()) if out is not None else 0
