"""What autograd keeps between a forward and its backward pass."""

import torch


def kept(forward):
    """The tensors that a call saves, each piece of memory once, and what it returns."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return list(found.values()), result


def bytes_kept(model, *inputs):
    """Without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    tensors, _ = kept(lambda: model(*inputs))
    return sum(t.untyped_storage().nbytes() for t in tensors if t.untyped_storage().data_ptr() not in own)
