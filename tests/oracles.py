"""What the operators must compute, from the papers, in eager torch. Shares nothing with the library."""

import torch

# ---- staircase ReLU: BCGD (Yin et al. 2019), section 2 ----


def opmath(t):
    """The precision of the arithmetic: float32 for the half precisions."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def along(alpha, x, channel_dim):
    """alpha broadcast against x, in the precision of x's arithmetic."""
    alpha = alpha.to(opmath(x).dtype)
    if alpha.numel() == 1:
        return alpha.reshape(())
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    return alpha.reshape(shape)


def level(x, alpha, bits, channel_dim=1):
    """The index of the step: x in ((k-1) alpha, k alpha] is on step k, and step 2^b - 1 has no end."""
    x, a = opmath(x), along(alpha, x, channel_dim)
    k = torch.ceil(x / a)
    k = torch.where(k > 2**bits - 1, torch.full_like(k, 2**bits - 1), k)
    k = torch.where(k < 1, torch.ones_like(k), k)  # x / a may underflow
    k = torch.where(x > 0, k, torch.zeros_like(k))
    return torch.where(torch.isnan(x) | ~(a > 0), torch.full_like(k, torch.nan), k)


def staircase(x, alpha, bits, channel_dim=1):
    k = level(x, alpha, bits, channel_dim)
    y = torch.where(k == 0, torch.zeros_like(k), along(alpha, x, channel_dim) * k)
    return y.to(x.dtype)


def ste_slope(x, alpha, bits, ste, channel_dim=1):
    """The derivative of the proxy function; q is the largest output of the staircase."""
    z, q = opmath(x), (2**bits - 1) * along(alpha, x, channel_dim)
    positive = (z > 0).to(z.dtype)
    slope = {
        "identity": lambda: torch.ones_like(z),
        "relu": lambda: positive,
        "clipped_relu": lambda: positive * (z <= q),
        "log_tailed_relu": lambda: torch.where(z > q, 1 / (z - q + 1), positive),
        "reverse_exponential": lambda: torch.where(z > 0, torch.exp(-z / q), 0),
    }[ste]()
    return torch.where(torch.isnan(z) | ~(q > 0), torch.nan, slope)


def alpha_slope(x, alpha, bits, rule, channel_dim=1):
    """The coarse derivative of the staircase in alpha."""
    z, q, top = opmath(x), (2**bits - 1) * along(alpha, x, channel_dim), 2**bits - 1
    middle = {
        "exact": level(x, alpha, bits, channel_dim),
        "three_valued": 2 ** (bits - 1),
        "min": 1,
        "pact": 0,
    }[rule]
    slope = torch.where(
        z > q, top, torch.where(z > 0, torch.as_tensor(middle, dtype=z.dtype, device=z.device), 0.0)
    )
    return torch.where(torch.isnan(z) | ~(q > 0), torch.nan, slope)


def staircase_grads(grad, x, alpha, bits, ste, rule, channel_dim=1):
    """The gradients of x (exactly rounded once) and of alpha (summed in float64)."""
    grad_x = opmath(grad) * ste_slope(x, alpha, bits, ste, channel_dim)
    terms = grad.double() * alpha_slope(x, alpha, bits, rule, channel_dim).double()
    if alpha.numel() == 1:
        grad_alpha = terms.sum().reshape(alpha.shape)
    else:
        grad_alpha = terms.movedim(channel_dim, 0).flatten(1).sum(1)
    return grad_x.to(x.dtype), grad_alpha


# ---- the step size that fits data best: calibrate ----


def step_size_error(x, steps, bits):
    """The mean squared error of the staircase for the positive part of x, for each of the step sizes."""
    x = x.double().flatten()
    y = staircase(x.expand(len(steps), -1), steps, bits, channel_dim=0)
    return (y - x.clamp_min(0)).square().mean(1)


def best_step_size(x, bits):
    """(step size of least error, that error), by trying many, then many around the best."""
    steps = torch.logspace(-3.5, 0, 1001, dtype=torch.float64, device=x.device) * x.double().max()
    best = int(step_size_error(x, steps, bits).argmin())
    low, high = steps[max(best - 3, 0)], steps[min(best + 3, 1000)]
    steps = low + (high - low) * torch.linspace(0, 1, 1001, dtype=torch.float64, device=x.device)
    errors = step_size_error(x, steps, bits)
    return steps[errors.argmin()], errors.min()


# ---- packed codes: the definition in pack_codes ----


def packed_codes(codes, bits):
    """Code i of the row-major order is in bits i * bits % 8 and up of byte i * bits // 8."""
    packed = [0] * -(-codes.numel() * bits // 8)
    for i, code in enumerate(codes.flatten().tolist()):
        packed[i * bits // 8] |= code << i * bits % 8
    return torch.tensor(packed, dtype=torch.uint8, device=codes.device)


# ---- weight quantization: BCGD, section 3; the optimum by trying every breakpoint of the step size ----


def top_level(bits):
    return 1 if bits == 1 else 2 ** (bits - 1) - 1


def nearest_level(w, step, bits):
    """Level j on (j - 1/2, j + 1/2] * step, both signs; at one bit the sign, that of 0 being +."""
    if bits == 1:
        return torch.where(w < 0, -torch.ones_like(w), torch.ones_like(w))
    top = top_level(bits)
    ratio = w.abs() / step
    level = torch.zeros_like(w)
    for j in range(1, top + 1):
        level = torch.where(ratio > j - 0.5, torch.full_like(w, j), level)
    return level * torch.sign(w)


def best_scale_for(w, q):
    """The least-squares scale of given levels, in float64."""
    w, q = w.double(), q.double()
    energy = (q * q).sum()
    return (w * q).sum() / energy if energy > 0 else torch.zeros((), dtype=torch.float64, device=w.device)


def exact_scale(w, bits):
    """As the step falls, |w| gains level j at |w| / (j - 1/2): all of these in order, the best fit."""
    magnitude = w.double().abs().flatten()
    if bits == 1:
        return magnitude.mean()
    j = torch.arange(1, top_level(bits) + 1, dtype=torch.float64, device=w.device)
    breakpoints = (magnitude[:, None] / (j - 0.5)).flatten()
    order = breakpoints.argsort(descending=True, stable=True)
    overlap = magnitude[:, None].expand(-1, len(j)).flatten()[order].cumsum(0)
    energy = (2 * j - 1).expand(len(magnitude), -1).flatten()[order].cumsum(0)
    best = (overlap / energy.sqrt()).argmax()
    return overlap[best] / energy[best]


def lloyd_scale(w, bits):
    """(step that assigns the levels, best scale for them): one Lloyd step from 2 max|w| / (2^b - 1)."""
    step = (2 * w.double().abs().max() / (2**bits - 1)).to(opmath(w).dtype)
    return step, best_scale_for(w, nearest_level(opmath(w), step, bits))


def twn_levels(w):
    """Ternary weight networks (Li, Zhang, Liu 2016): what is at least 0.7 of the mean magnitude is kept."""
    threshold = (0.7 * w.double().abs().mean()).to(opmath(w).dtype)
    return torch.sign(w) * (opmath(w).abs() >= threshold)


# ---- BCGD: one step (Yin et al. 2019, algorithm 1), its direction by the rules of torch.optim.SGD ----


def sgd_direction(
    g, y, buffer, first, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False
):
    """(direction, new buffer) for the parameter y."""
    d = (-g if maximize else g) + weight_decay * y
    if momentum == 0:
        return d, None
    buffer = d if first else momentum * buffer + (1 - dampening) * d
    return d + momentum * buffer if nesterov else buffer, buffer


def bcgd_latent(w, g, y, buffer, first, lr, blend, grad_scale=1.0, **sgd):
    """(new latent, new buffer): blend, then an SGD step on the blended latent."""
    blended = (1 - blend) * y + blend * w.to(y.dtype)
    d, buffer = sgd_direction(g.to(y.dtype) / grad_scale, blended, buffer, first, **sgd)
    return blended - lr * d, buffer


def warm_scale(y, before, bits):
    """The best scale for the best of the levels that step sizes around the scale before assign.

    Where that is too large for any level but 0, the papers' step size.
    """
    steps = [(before.double() * share).to(y.dtype) for share in (1, 31 / 32, 33 / 32, 7 / 8, 9 / 8)]
    levels = [q for q in (nearest_level(y, step, bits).double() for step in steps) if q.any()]
    if not levels:
        return lloyd_scale(y, bits)[0]
    scores = [(y.double() * q).sum() / (q * q).sum().sqrt() for q in levels]
    equally_good = max(scores) * (1 - 1e-14)  # a single weight is fitted by any level
    return best_scale_for(y, next(q for q, s in zip(levels, scores, strict=True) if s >= equally_good))


def bcgd_projection(y, before, bits, method):
    """(scale in float64, step that assigns the levels or None where it is the scale, function that does)."""

    def nearest(step):
        return nearest_level(y, step, bits)

    if y.numel() == 0:
        return torch.zeros(()), None, nearest
    if method == "twn":
        return best_scale_for(y, twn_levels(y)), 0, lambda _: twn_levels(y)
    if method == "lloyd" and bits > 1:
        step, scale = lloyd_scale(y, bits)
        return scale, step, nearest
    return (exact_scale(y, bits) if bits <= 2 else warm_scale(y, before, bits)), None, nearest


# ---- feature affinity (Li, Yang, Yin, Qi, Xin 2023) ----


def affinity(features, eps=1e-5):
    """How alike the pixels are: the products of all pairs of unit columns, (batch, pixels, pixels), float64.

    Where a column is zero its gradient is zero: torch.linalg.vector_norm has that subgradient, and the
    division by eps, which would blow up what comes back, is left out.
    """
    columns = features.double().flatten(2)
    norm = torch.linalg.vector_norm(columns, dim=1, keepdim=True)
    unit = torch.where(norm == 0, 0, columns / torch.where(norm == 0, 1, norm + eps))
    return unit.mT @ unit


def affinity_difference(student, teacher, eps=1e-5):
    return affinity(student, eps) - affinity(teacher, eps)


def over_batch(values, reduction):
    return values.mean() if reduction == "mean" else values.sum()


def feature_affinity(student, teacher, norm="l1", reduction="mean", eps=1e-5):
    s = affinity_difference(student, teacher, eps)
    pixels = s.shape[-1]
    if norm == "l1":
        total = (s * (1 - torch.eye(pixels, device=s.device))).abs().sum((1, 2))
    else:
        total = s.square().sum((1, 2))
    return over_batch(total, reduction) / pixels**2


def fast_feature_affinity(student, teacher, probes, norm="l1", reduction="mean", eps=1e-5):
    probed = affinity_difference(student, teacher, eps) @ probes.double()
    total = probed.abs() if norm == "l1" else probed.square()
    return over_batch(total.mean(2).sum(1), reduction) / probed.shape[1] ** 2
