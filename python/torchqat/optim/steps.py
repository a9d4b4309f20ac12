"""One step of one parameter group: plain SGD, or the fused quantized step."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from torchqat import functional as F
from torchqat.optim.latents import add_momentum

Group = dict[str, Any]
State = dict[str, Any]

SGD_OPTIONS = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")


def plain_step(
    group: Group, params: list[Tensor], state: dict[Tensor, State], grad_scale: Tensor | None
) -> None:
    """The step of torch.optim.SGD(foreach=False, fused=False), then the clamp to `min_value`."""
    grads = [p.grad for p in params]
    if grad_scale is not None:
        inverse = grad_scale.double().reciprocal().float()  # as GradScaler.unscale_ has it
        grads = [(g * inverse.to(g.device)).to(g.dtype) for g in grads]
    momentum = group["momentum"] != 0
    buffers = [state[p].get("momentum_buffer") for p in params] if momentum else []
    sgd(params, grads, buffers, foreach=False, fused=False, **{key: group[key] for key in SGD_OPTIONS})
    if momentum:
        for p, buffer in zip(params, buffers, strict=True):
            state[p]["momentum_buffer"] = buffer
    if group["min_value"] is not None:
        for p in params:
            p.clamp_(min=group["min_value"])


def quantized_step(
    group: Group,
    params: list[Tensor],
    state: dict[Tensor, State],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One call of bcgd_step_ for each device among the parameters, whatever their dtypes."""
    momentum = group["momentum"] != 0
    batches = defaultdict(lambda: ([], [], [], [], [], []))
    for p in params:
        own = state[p]
        listed, grads, latents, scales, buffers, steps = batches[p.device]
        listed.append(p)
        grads.append(p.grad)
        latents.append(own["latent"])
        scales.append(own["scale"])
        if momentum:
            if "step" not in own:
                add_momentum(p, own)
            buffers.append(own["momentum_buffer"])
            steps.append(own["step"])
    for device, lists in batches.items():
        F.bcgd_step_(
            *lists,
            lr=_lr_on(device, group["lr"]),
            bits=group["quant_bits"],
            channel_dim=group["channel_dim"],
            method=group["method"],
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
            blend=group["blend"],
            maximize=group["maximize"],
            grad_scale=None if grad_scale is None else grad_scale.to(device),
            found_inf=None if found_inf is None else found_inf.to(device),
        )


def _lr_on(device: torch.device, lr: float | Tensor) -> Tensor:
    """0-dim: on the CPU, where it is read by value, or on the device, where the kernel reads it."""
    if not isinstance(lr, Tensor):
        return torch.tensor(lr, dtype=torch.float64, device="cpu")
    lr = lr.detach().reshape(())
    return lr if lr.device.type == "cpu" else lr.to(device)
