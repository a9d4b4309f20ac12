"""Parameters and their float latents: making them, comparing them, swapping them."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchqat import functional as F

Group = dict[str, Any]
State = dict[str, Any]
Pairs = list[tuple[Tensor, Group]]


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype of latent, scale and momentum."""
    return torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype


def new_latent(param: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """The latent that the values of `param` make, its projection and its scale."""
    latent = param.detach().to(compute_dtype(param), copy=True)
    options = {"method": group["method"], "channel_dim": group["channel_dim"]}
    return latent, *F.quantize_weight(latent, group["quant_bits"], **options)


def add_momentum(param: Tensor, state: State) -> None:
    """A momentum buffer that the first step overwrites; one left by plain SGD steps goes on instead."""
    taken = "momentum_buffer" in state
    buffer = state.get("momentum_buffer", torch.zeros_like(state["latent"]))
    state["momentum_buffer"] = buffer.to(state["latent"].dtype)
    state["step"] = torch.full((), float(taken), dtype=torch.float32, device=param.device)


def projection(state: State, group: Group) -> Tensor:
    """w as a step leaves it: scale * level, from the latent and the stored scale."""
    latent, scale = state["latent"], state["scale"]
    bits, channel_dim, method = group["quant_bits"], group["channel_dim"], group["method"]
    nearest = latent
    if method != "exact":
        # The levels of these methods are not those nearest to the latent at the final scale.
        nearest, _ = F.quantize_weight(latent, bits, method=method, channel_dim=channel_dim)
    codes = F.weight_codes(nearest, scale, bits, channel_dim=channel_dim)
    if scale.dim() == 1:
        scale = scale.reshape([-1 if d == channel_dim % latent.dim() else 1 for d in range(latent.dim())])
    return codes.to(latent.dtype) * scale


def holds_projection(param: Tensor, state: State, group: Group) -> bool:
    """Whether the parameter's values are the projection of its latent; NaN equals NaN."""
    if state["latent"].shape != param.shape:
        return False
    w = projection(state, group).to(param.dtype)
    return torch.equal(param, w) or bool(((param == w) | (param.isnan() & w.isnan())).all())


def was_quantized(param: Tensor, state: State, group: Group) -> bool:
    """Whether the values that became the latent were a projection already, but for rounding.

    Nothing can be told where the values are not more than their levels, or are all the same.
    """
    latent, levels = state["latent"], 2 ** group["quant_bits"] * state["scale"].numel()
    if latent.is_meta or latent.numel() <= levels or latent.min() == latent.max():
        return False
    rounding = max(torch.finfo(param.dtype).eps, 2.0**-20)
    return torch.allclose(param.detach().to(latent.dtype), latent, rtol=rounding, atol=0.0)


def fit_to(param: Tensor, state: State) -> None:
    """Moves the state to the parameter's device and dtype, where the model was moved or cast meanwhile."""
    for key in ("latent", "momentum_buffer", "scale"):
        if key in state:
            state[key] = state[key].to(param.device, compute_dtype(param))
    if "step" in state:
        state["step"] = state["step"].to(param.device)


def restored(param: Tensor, saved: State) -> State:
    """A copy of a saved state, in the dtype of computation and with the parameter's strides."""
    dtype = compute_dtype(param)
    state = dict(saved)
    for key in ("latent", "momentum_buffer"):
        if key in saved:
            state[key] = torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(saved[key])
    state["scale"] = saved["scale"].to(param.device, dtype, copy=True)
    if "step" in saved:
        state["step"] = saved["step"].to(param.device, torch.float32, copy=True)
    return state


class LatentOptimizer(torch.optim.Optimizer):
    """An optimizer whose groups with `quant_bits` keep a float latent beside each quantized parameter."""

    def __init__(self, params: Iterable, defaults: dict[str, Any]) -> None:
        self._warned = False
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        # What the optimizer left of each parameter: version counter and address. Never saved: a parameter
        # without an entry has its values compared.
        self._left: dict[int, tuple[int, int]] = {}
        # Parameters that were quantized when they were added; a state_dict may still bring their latents.
        self._starts_quantized: list[Tensor] = []
        self._swapped = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._warned = getattr(self, "_warned", False)
        self._forget()

    def latent(self, param: Tensor) -> Tensor:
        """The float latent of a quantized parameter: the optimizer's own tensor, not a copy.

        Args:
            param: a parameter of a group with ``quant_bits``.

        Returns:
            Tensor: the shape of ``param``; float32 for half and bfloat16, else its dtype.
        """
        latent = self.state.get(param, {}).get("latent")
        if latent is None:
            raise ValueError("BCGD: latent is for parameters of groups with quant_bits, got another")
        return latent

    @contextmanager
    def latents(self) -> Iterator[None]:
        """Within ``with optimizer.latents():`` the quantized parameters hold their latents.

        For evaluating the float network, saving it, or averaging latents. On leaving, also by an exception,
        each parameter gets back what it held, bit for bit; what was written to it inside is lost. Costs a
        copy of the quantized weights. Half and bfloat16 parameters hold the rounded latents.

        Example:
            >>> import torch, torchqat
            >>> layer = torch.nn.Linear(3, 2)
            >>> optimizer = torchqat.optim.BCGD([{"params": [layer.weight], "quant_bits": 2}], lr=0.1)
            >>> with optimizer.latents():
            ...     float_state = {k: v.clone() for k, v in layer.state_dict().items()}
        """
        self._refuse_swapped("latents")
        pairs = quantized_pairs(self.param_groups)
        self._adopt(self._changed(pairs))
        held = [(p, p.detach().clone()) for p, _ in pairs]
        self._swapped = True
        try:
            with torch.no_grad():
                for p, _ in held:
                    p.copy_(self.state[p]["latent"])
            yield
        finally:
            with torch.no_grad():
                for p, w in held:
                    p.copy_(w)
                    self._leave(p)
            self._swapped = False

    def refresh(self) -> None:
        """Compares every quantized parameter with its latent and gives those that differ a new one, silently.

        For use after writes through ``parameter.data``, or when a change from outside is meant.
        """
        self._refuse_swapped("refresh")
        self._left.clear()
        self._adopt(self._changed(quantized_pairs(self.param_groups)), warn=False)

    def _refuse_swapped(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(
                f"BCGD: {what} must not be called inside latents(): the parameters hold latents"
            )

    def _leave(self, param: Tensor) -> None:
        self._left[id(param)] = (param._version, param.data_ptr())

    def _changed(self, pairs: Pairs) -> Pairs:
        """Those of the parameters that do not hold the projection of their latent."""
        found = []
        for p, group in pairs:
            state = self.state[p]
            if "latent" not in state:
                found.append((p, group))
            elif self._left.get(id(p)) != (p._version, p.data_ptr()):
                fit_to(p, state)
                if holds_projection(p, state, group):
                    self._leave(p)
                else:
                    found.append((p, group))
        return found

    @torch.no_grad()
    def _adopt(self, pairs: Pairs, warn: bool = True) -> None:
        """Makes the values of these parameters their latents, and quantizes the parameters."""
        lost = [p for p, _ in pairs if "latent" in self.state.get(p, {})]
        if warn and lost and not self._warned:
            warnings.warn(_lost_latents(lost), stacklevel=2)
            self._warned = True
        # All projections before any change: a bad option raises with nothing done.
        fresh = [new_latent(p, group) for p, group in pairs]
        for (p, group), (latent, w, scale) in zip(pairs, fresh, strict=True):
            state = self.state[p]
            state.update(latent=latent, scale=scale)
            if group["momentum"] != 0 and "step" not in state:
                add_momentum(p, state)
            p.copy_(w)
            self._leave(p)

    def _take_up(self, groups: list[Group]) -> None:
        """Quantizes the parameters of new groups; when it raises, each has its values back."""
        pairs = quantized_pairs(groups)
        try:
            self._adopt(pairs)
            starts = [p for p, group in pairs if was_quantized(p, self.state[p], group)]
        except BaseException:
            with torch.no_grad():
                for p, _ in pairs:
                    state = self.state.pop(p, None)  # else it could not be added again
                    if self._left.pop(id(p), None):
                        p.copy_(state["latent"])
            raise
        self._starts_quantized += starts

    def _warn_of_quantized_starts(self) -> None:
        if self._starts_quantized:
            warnings.warn(_quantized_starts(self._starts_quantized), stacklevel=3)
            self._starts_quantized = []

    @torch.no_grad()
    def _restore(self, param: Tensor, group: Group, saved: State) -> None:
        """Takes a saved state over; the parameter then holds its projection."""
        self.state[param] = restored(param, saved)
        if not holds_projection(param, self.state[param], group):
            param.copy_(projection(self.state[param], group))
        self._leave(param)


def all_pairs(groups: list[Group]) -> Pairs:
    return [(p, group) for group in groups for p in group["params"]]


def quantized_pairs(groups: list[Group]) -> Pairs:
    return all_pairs([group for group in groups if group["quant_bits"] is not None])


def _lost_latents(params: list[Tensor]) -> str:
    return (
        f"BCGD: {len(params)} parameter(s) changed outside the optimizer, the first of shape "
        f"{tuple(params[0].shape)}: their float latents are dropped and start again from the new values. "
        "Load a checkpoint into both model and optimizer to go on with its latents. (Warned of once.)"
    )


def _quantized_starts(params: list[Tensor]) -> str:
    return (
        f"BCGD: {len(params)} parameter(s), the first of shape {tuple(params[0].shape)}, held quantized "
        "values when this optimizer was made: their float latents start from those. If an earlier BCGD "
        "quantized them, its latents are not used. Go on with that optimizer, load its state_dict into this "
        "one, or copy its latent(p) into each parameter p before this one is made."
    )
