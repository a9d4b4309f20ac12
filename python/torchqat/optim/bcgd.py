"""BCGD: stochastic gradient descent for quantized weights."""

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torchqat.optim import checks
from torchqat.optim.latents import LatentOptimizer, all_pairs
from torchqat.optim.steps import plain_step, quantized_step

NOTHING_QUANTIZED = (
    "BCGD: no group has quant_bits, so nothing is quantized: each step is that of torch.optim.SGD, and step "
    "sizes of StaircaseReLUs are not clamped to alpha_min (forward still does not go below it). Make groups "
    "with torchqat.optim.param_groups(model, weight_bits); quant_bits=None in one says that this is meant."
)


class BCGD(LatentOptimizer):
    r"""Blended coarse gradient descent, Algorithm 1 of Yin, Zhang, Lyu, Osher, Qi and Xin, "Blended coarse
    gradient descent for full quantization of deep neural networks" (2019).

    Each weight tensor has two values: the quantized :math:`w`, which the parameter itself holds, so that the
    network runs on it at no cost, and the float *latent* :math:`y`, which the optimizer keeps. With the
    gradient :math:`g` taken at :math:`w`, a step is

    .. math::
        y &\leftarrow (1 - \rho)\, y + \rho\, w \\
        y &\leftarrow y - \eta\, d, \qquad d = \text{SGD's direction from } g + \lambda y \\
        w &\leftarrow \mathrm{Proj}(y) = s \cdot q \quad \text{(the nearest levels q and their scale s)}

    with momentum, dampening and Nesterov as in :class:`torch.optim.SGD`. Only groups with ``quant_bits`` are
    quantized; every other group takes the step of ``torch.optim.SGD(foreach=False, fused=False)``, bit for
    bit.

    **The parameters are quantized as soon as the optimizer is made** (or a group is added), so that the first
    gradient is already taken at :math:`w`; where a group is refused, none is. Move the model to its device
    and load its weights before; prepare it before too (:func:`torchqat.prepare`), else its step sizes are in
    no group and are not trained.

    **One optimizer per model.** The float weights live here and nowhere else. A second optimizer of the same
    parameters, or one made after loading the model's state alone, starts its latents from quantized values:
    its first step warns of that. Go on with the first, or load its ``state_dict``.

    **Changes from outside.** As long as a parameter holds the projection of its latent, the latent counts. A
    parameter that was given other values (an edit in place, new storage, ``load_state_dict`` of the model
    alone) gets a new latent, the new values, at its next step, with one warning per optimizer; its momentum
    stays. Values swapped out and back, as averaging schemes do to evaluate, cost one comparison and nothing
    else. A write through ``parameter.data`` leaves no trace that could be seen without reading all weights
    each step: call :meth:`refresh` after one, else the next step writes over it.

    **The projection.** At one and two bits ``exact`` is the least-squares optimum at each step; from three on
    it follows the optimum by a warm start, how closely says :func:`torchqat.functional.bcgd_step_`.

    **Checkpoints.** Save and load the state of the model *and* of the optimizer, in either order, before or
    after the optimizer is made: training goes on bit for bit. :meth:`load_state_dict` sets the parameters of
    quantized groups to the projections of the latents that it loads. State saved while parameters hold values
    from outside has the latents of before; call :meth:`refresh` first to have those of the new values.

    With ``DistributedDataParallel``, wrap the model first: it copies the first process's parameters to the
    others. With :class:`torch.amp.GradScaler`, a skipped step changes nothing; where there are groups without
    ``quant_bits`` the host reads whether to skip, as it does for ``torch.optim.SGD``.

    Args:
        params: parameters or groups of them, as for every optimizer; see :func:`param_groups`. Where no group
            says ``quant_bits``, a warning tells that nothing is quantized. Besides the options below,
            ``name`` and what torch's schedulers write, a group may have these keys and no others (keys of
            your own can be set in ``param_groups`` afterwards):

            - ``quant_bits`` (1 to 8; 2 is ternary; default None: a plain SGD group),
            - ``channel_dim`` (default None: one scale per tensor; else one per index of that dimension),
            - ``method`` (``exact``, ``lloyd``, ``twn``; see :func:`torchqat.functional.quantize_weight`),
            - ``min_value`` (default None; groups without ``quant_bits`` only): parameters are clamped to at
              least this after each step, as the papers do with the step sizes alpha of the activations.
        lr: learning rate :math:`\eta`, a number or a tensor with one element.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: :math:`\lambda`; acts on the blended latent.
        nesterov: Nesterov momentum; needs momentum and no dampening.
        blend: :math:`\rho`, 0 to 1: 0 is BinaryConnect, 1 projected gradient descent.
        maximize: ascend instead.

    The state of a quantized parameter: ``latent`` (its shape), ``scale`` (0-dim or one per channel) and, with
    momentum, ``momentum_buffer`` (its shape) and ``step`` (0-dim float32, the steps taken). The first three
    are float32 for half and bfloat16 parameters, else of the parameter's dtype.

    Raises:
        ValueError: options out of range, an unknown key in a group, a ``state_dict`` of another model or
            another quantization.
        TypeError: a parameter that is not real floating point in a quantized group; a tensor of integers as
            ``lr``; ``quant_bits`` that is no int.
        RuntimeError: sparse gradients in a quantized group; a step inside :meth:`latents`.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer.weight = torch.nn.Parameter(torch.tensor([[0.5, -1.5]]))
        >>> optimizer = BCGD([{"params": [layer.weight], "quant_bits": 1}], lr=0.1)
        >>> layer.weight.tolist(), optimizer.latent(layer.weight).tolist()
        ([[1.0, -1.0]], [[0.5, -1.5]])
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.latent(layer.weight)
        tensor([[ 0.4000, -1.6000]])
    """

    # While the constructor adds groups: all of them are checked before the first is quantized.
    _collecting = False

    # torch.amp.GradScaler then sets grad_scale and found_inf instead of unscaling the gradients itself.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        blend: float = 1e-5,
        maximize: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            blend=blend, maximize=maximize, quant_bits=None, channel_dim=None, method="exact", min_value=None,
            differentiable=False,
        )  # fmt: skip
        checks.check_options(defaults)
        params = params if isinstance(params, Tensor) else list(params)  # torch refuses a tensor
        bits_given = any(isinstance(group, dict) and "quant_bits" in group for group in params)
        self._collecting = True
        super().__init__(params, defaults)
        self._collecting = False
        self._take_up(self.param_groups)
        if not bits_given:
            warnings.warn(NOTHING_QUANTIZED, stacklevel=2)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, at any time; its parameters are quantized at once where it has ``quant_bits``.

        Args:
            param_group: ``params`` and options, as in the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            checks.check_group(group, self.defaults)
            if not self._collecting:
                self._take_up([group])
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step with every parameter that has a gradient; the others stay untouched.

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        self._refuse_swapped("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._warn_of_quantized_starts()
        plain, quantized = self._with_gradients()
        changed = self._changed([(p, group) for group, params in quantized for p in params])
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        # bcgd_step_ reads found_inf itself, on the device; everything else that would happen has to ask here.
        if found_inf is not None and (plain or changed) and found_inf.item():
            return loss
        self._adopt(changed)
        for group, params in quantized:
            quantized_step(group, params, self.state, grad_scale, found_inf)
            for p in params:
                self._leave(p)
        for group, params in plain:
            plain_step(group, params, self.state, grad_scale)
        return loss

    def _with_gradients(self) -> tuple[list, list]:
        """The plain and the quantized groups, each with those of its parameters that have a gradient."""
        plain, quantized = [], []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["quant_bits"] is None:
                plain.append((group, params))
            elif params:
                checks.refuse_sparse_gradients(params)
                quantized.append((group, params))
        return plain, quantized

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` of an optimizer with the same groups returned.

        All tensors are copied, and those of quantized parameters keep their dtype. Quantized parameters then
        hold the projections of the loaded latents. When this raises ValueError, nothing has changed.

        Args:
            state_dict: groups and state; that of ``torch.optim.SGD`` fits where no group is quantized.
        """
        self._refuse_swapped("load_state_dict")
        states = []

        def check(_, state_dict: dict[str, Any]) -> dict[str, Any]:
            checks.check_saved_parts(state_dict)
            groups, saved = state_dict["param_groups"], state_dict["state"]
            checks.check_saved_groups(groups, self.param_groups)
            states.extend(saved.get(number, {}) for group in groups for number in group["params"])
            for number, (p, group) in enumerate(all_pairs(self.param_groups)):
                checks.check_saved_state(p, states[number], group, number)
            own = [{key: group[key] for key in self.defaults} for group in self.param_groups]
            return {**state_dict, "param_groups": [{**o, **g} for o, g in zip(own, groups, strict=True)]}

        def restore(_) -> None:
            self._starts_quantized = []
            for (p, group), saved in zip(all_pairs(self.param_groups), states, strict=True):
                if group["quant_bits"] is not None:
                    self._restore(p, group, saved)
                elif p in self.state:  # torch may have kept the tensors of the state_dict themselves
                    self.state[p] = copy.deepcopy(self.state[p])

        # Around torch's own loading, which casts the state to the parameter's dtype: after the user's hooks
        # that change the state_dict, before those that look at the result.
        with (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ):
            super().load_state_dict(state_dict)
