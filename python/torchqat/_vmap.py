"""Rules by which torch.vmap batches the operators (layers: in C++, as what they call)."""

import torch

register = torch.library.register_vmap


def _front(t, dim, size):
    """``t`` with the batch dimension first, expanded where ``t`` is not batched."""
    return t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _flatten_channels(name, x, x_dim, alpha, alpha_dim, channel_dim, size):
    """Batched arguments as one call's: (x, alpha, channel_dim, function that brings the result back).

    A batch of step sizes is a channel dimension of its own, merged with the one there is.
    """
    x = _front(x, x_dim, size)
    if alpha_dim is None:
        per_tensor = alpha.numel() == 1
        return x, alpha, 0 if per_tensor else _shifted(name, x, channel_dim), lambda y: y
    alpha = alpha.movedim(alpha_dim, 0)
    if alpha.numel() == size:
        return x, alpha.reshape(size), 0, lambda y: y
    dim = _shifted(name, x, channel_dim)
    merged = x.movedim(dim, 1)
    shape = merged.shape
    if alpha.shape != shape[:2]:
        raise ValueError(
            f"{name}: alpha must have one element, or one for each of the {shape[1]} channels of x, "
            f"got shape {tuple(alpha.shape[1:])}"
        )
    return merged.flatten(0, 1), alpha.flatten(), 0, lambda y: y.reshape(shape).movedim(1, dim)


def _shifted(name, batch, channel_dim):
    """``channel_dim`` of one sample as a dimension of the batch, whose dimension 0 is the batch's."""
    dims = batch.dim() - 1
    if not -dims <= channel_dim < dims:
        shape = list(batch.shape[1:])
        raise ValueError(f"{name}: channel_dim must be a dimension of shape {shape}, got {channel_dim}")
    return channel_dim % dims + 1


def _register_staircase(name):
    op = getattr(torch.ops.qat, name)

    @register(f"qat::{name}")
    def rule(info, in_dims, x, alpha, bits, channel_dim=1, **options):
        size = info.batch_size
        x, alpha, channel_dim, restore = _flatten_channels(
            name, x, in_dims[0], alpha, in_dims[1], channel_dim, size
        )
        return restore(op(x, alpha, bits, channel_dim=channel_dim, **options)), 0


_register_staircase("staircase_relu")
_register_staircase("staircase_codes")


def _register_one_by_one(name):
    """For operators that would need a rule of their own to batch: they take sample by sample, so that
    per-sample gradients work."""
    op = getattr(torch.ops.qat, name)

    @register(f"qat::{name}")
    def rule(info, in_dims, *args, **options):
        if info.batch_size == 0:
            raise ValueError(f"{name.lstrip('_')}: vmap must have at least one sample, got none")
        dims = list(in_dims) + [None] * (len(args) - len(in_dims))
        samples = [
            op(
                *(
                    a.select(d, i) if isinstance(a, torch.Tensor) and d is not None else a
                    for a, d in zip(args, dims, strict=True)
                ),
                **options,
            )
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], torch.Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(parts) for parts in zip(*samples, strict=True)), (0, 0)


for _name in (
    "_staircase_relu_forward",
    "_staircase_relu_backward",
    "pack_codes",
    "unpack_codes",
    "feature_affinity_loss",
    "fast_feature_affinity_loss",
    "_feature_affinity_loss",
    "_fast_feature_affinity_loss",
    "_feature_affinity_backward",
):
    _register_one_by_one(_name)
del _name


@register("qat::_staircase_relu_rebuild")
def _staircase_relu_rebuild(info, in_dims, codes, alpha, *args):
    """The gradient, its last argument, is not read: a batch of those alone is one call."""
    op = torch.ops.qat._staircase_relu_rebuild
    if in_dims[0] is None and in_dims[1] is None:
        return op(codes, alpha, *args), None
    codes, alpha = _front(codes, in_dims[0], info.batch_size), _front(alpha, in_dims[1], info.batch_size)
    return torch.stack([op(c, a, *args) for c, a in zip(codes, alpha, strict=True)]), 0


@register("qat::_bounded_alpha")
def _bounded_alpha(info, in_dims, alpha, *bounds):
    return torch.ops.qat._bounded_alpha(alpha, *bounds), in_dims[0]


def _batch_of_channels(name, weight, channel_dim):
    """Weights with a scale per sample, or per sample and channel, as weights with a scale per index of
    dimension 0: (weights, function that brings quantized weights back, shape of the scales)."""
    if channel_dim is None:
        return weight, lambda w: w, weight.shape[:1]
    dim = _shifted(name, weight, channel_dim)
    merged = weight.movedim(dim, 1)
    shape = merged.shape
    return merged.flatten(0, 1), lambda w: w.reshape(shape).movedim(1, dim), shape[:2]


@register("qat::quantize_weight")
def _quantize_weight(info, in_dims, weight, bits, *, method="exact", channel_dim=None):
    weight, restore, scales = _batch_of_channels(
        "quantize_weight", weight.movedim(in_dims[0], 0), channel_dim
    )
    quantized, scale = torch.ops.qat.quantize_weight(weight, bits, method=method, channel_dim=0)
    return (restore(quantized), scale.reshape(scales)), (0, 0)


@register("qat::weight_codes")
def _weight_codes(info, in_dims, weight, scale, bits, *, channel_dim=None):
    weight = _front(weight, in_dims[0], info.batch_size)
    scale = _front(scale, in_dims[1], info.batch_size)
    weight, restore, scales = _batch_of_channels("weight_codes", weight, channel_dim)
    if scale.shape != scales:
        raise ValueError(
            f"weight_codes: scale must have shape {tuple(scales[1:])}, got {tuple(scale.shape[1:])}"
        )
    return restore(torch.ops.qat.weight_codes(weight, scale.flatten(), bits, channel_dim=0)), 0
