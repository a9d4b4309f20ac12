"""Writes what the oracles compute to tests/cpp/oracle_values, where the C++ tests read it.

    python tests/write_oracle_values.py [--out FOLDER]

Nothing of the library takes part: tests/oracles.py, and torch for plain layers. Inputs are made of uniform
numbers by exactly rounded operations, so that every CPU draws the same; what needs more is float64.
"""

import argparse
import math
from pathlib import Path

import oracles
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "cpp/oracle_values"
STES = ["identity", "relu", "clipped_relu", "log_tailed_relu", "reverse_exponential"]
RULES = ["exact", "three_valued", "min", "pact"]


def uniform(*shape, low=-1.0, high=1.0):
    return low + (high - low) * torch.rand(shape)


# ---- operators ----


def staircase_relu():
    values = {"grad": uniform(2, 3, 3, 4)}
    for bits in (1, 2, 4, 8):
        top = 2**bits - 1
        scalar = torch.tensor(0.9 / top)
        x = uniform(2, 3, 3, 4, low=-0.6, high=1.6)
        x[0, 1, 0] = torch.stack([torch.zeros(()), scalar, 2 * scalar, top * scalar])  # where steps end
        values |= {f"{bits}.x": x}
        for kind, alpha in (("scalar", scalar), ("channels", scalar * torch.tensor([0.5, 1.0, 1.5]))):
            name = f"{bits}.{kind}"
            values |= {
                f"{name}.alpha": alpha,
                f"{name}.y": oracles.staircase(x, alpha, bits),
                f"{name}.codes": oracles.level(x, alpha, bits).to(torch.uint8),
            }
            for ste in STES:
                real = x.double() if ste == "reverse_exponential" else x
                grad_x, _ = oracles.staircase_grads(
                    values["grad"].to(real.dtype), real, alpha, bits, ste, "min"
                )
                values[f"{name}.{ste}.grad_x"] = grad_x
            for rule in RULES:
                _, grad_alpha = oracles.staircase_grads(values["grad"], x, alpha, bits, "relu", rule)
                values[f"{name}.{rule}.grad_alpha"] = grad_alpha
    return values


def projected(w, bits, method):
    """(scale, levels) of quantize_weight."""
    if method == "twn":
        levels = oracles.twn_levels(w)
        return oracles.best_scale_for(w, levels), levels
    if method == "lloyd" and bits > 1:
        step, scale = oracles.lloyd_scale(w, bits)
        return scale, oracles.nearest_level(w, step, bits)
    scale = oracles.exact_scale(w, bits)
    return scale, oracles.nearest_level(w.double(), scale, bits)


def methods(bits):
    return ["exact", "lloyd", "twn"] if bits == 2 else ["exact", "lloyd"]


def quantize_weight():
    weight = uniform(4, 3, 5) * uniform(4, 3, 5)
    values = {"weight": weight}
    for bits in range(1, 9):
        for method in methods(bits):
            for kind, slices in (("all", [weight]), ("0", weight.unbind(0)), ("1", weight.unbind(1))):
                scales, levels = zip(*(projected(w, bits, method) for w in slices), strict=True)
                name = f"{bits}.{method}.{kind}"
                values[f"{name}.scale"] = scales[0] if kind == "all" else torch.stack(scales)
                codes = levels[0] if kind == "all" else torch.stack(levels, int(kind))
                values[f"{name}.codes"] = codes.to(torch.int8)
    return values


def pack_codes():
    values = {}
    for bits in (1, 2, 4, 8):
        codes = torch.randint(2**bits, (3, 5), dtype=torch.uint8)
        values |= {f"{bits}.codes": codes, f"{bits}.packed": oracles.packed_codes(codes, bits)}
    return values


LR, BLEND, STEPS = 0.1, 0.25, 3
SGD = {
    "plain": {},
    "decay": dict(weight_decay=0.1),
    "momentum": dict(momentum=0.9),
    "dampening": dict(momentum=0.9, dampening=0.3, weight_decay=0.1, maximize=True),
    "nesterov": dict(momentum=0.9, nesterov=True, weight_decay=0.1),
}


def bcgd_steps(y, grads, bits, method, sgd):
    """(latent, scale, levels, momentum buffer) after some steps, all of them in float64."""
    scale, levels = projected(y, bits, method)
    buffer = None
    for number, grad in enumerate(grads):
        y, buffer = oracles.bcgd_latent(
            scale * levels, grad, y, buffer, number == 0, lr=LR, blend=BLEND, **sgd
        )
        new_scale, step, nearest = oracles.bcgd_projection(y, scale, bits, method)
        levels, scale = nearest(new_scale if step is None else step), new_scale
    return y, scale, levels, buffer


def bcgd_step():
    latent, grads = uniform(3, 4, 3), uniform(STEPS, 3, 4, 3)
    values = {"latent": latent, "grads": grads}
    for bits, method in [(b, method) for b in (1, 2, 3, 4, 8) for method in methods(b)]:
        for sgd, options in SGD.items():
            kinds = ("all", "channels") if sgd == "dampening" else ("all",) if method == "exact" else ()
            for kind in kinds:
                many = kind == "channels"
                pairs = zip(latent.unbind(1), grads.unbind(2), strict=True) if many else [(latent, grads)]
                results = [bcgd_steps(y.double(), g.double(), bits, method, options) for y, g in pairs]
                y, scale, levels, buffer = zip(*results, strict=True)
                name = f"{bits}.{method}.{kind}.{sgd}"
                values |= {
                    f"{name}.latent": torch.stack(y, 1) if many else y[0],
                    f"{name}.scale": torch.stack(scale) if many else scale[0],
                    f"{name}.codes": (torch.stack(levels, 1) if many else levels[0]).to(torch.int8),
                }
                if buffer[0] is not None:
                    values[f"{name}.buffer"] = torch.stack(buffer, 1) if many else buffer[0]
    return values


def feature_affinity_loss():
    values = {}
    for size, (student, teacher) in {
        "2d": (uniform(2, 3, 2, 3), uniform(2, 4, 2, 3)),
        "1d": (uniform(1, 5, 7), uniform(1, 2, 7)),
    }.items():
        student[0, :, 0] = 0  # columns of zeros have no gradient
        probes = uniform(teacher[0, 0].numel(), 3)
        values |= {f"{size}.student": student, f"{size}.teacher": teacher, f"{size}.probes": probes}
        for norm in ("l1", "fro"):
            for reduction in ("mean", "sum"):
                options = dict(norm=norm, reduction=reduction, eps=0.01)
                s, t = student.double().requires_grad_(), teacher.double().requires_grad_()
                losses = {
                    "exact": oracles.feature_affinity(s, t, **options),
                    "fast": oracles.fast_feature_affinity(s, t, probes, **options),
                }
                for kind, loss in losses.items():
                    name = f"{size}.{norm}.{reduction}.{kind}"
                    grads = torch.autograd.grad(loss, [s, t])
                    values |= {f"{name}.loss": loss.detach(), f"{name}.student_grad": grads[0]}
                    values |= {f"{name}.teacher_grad": grads[1]}
    return values


# ---- modules: a StaircaseReLU, and each layer behind one ----

MODULES = {  # options of the gradient of alpha: (alpha, scale, clip, min)
    "defaults": (0.3, 0.01, 1.0, 1e-3),
    "scaled": (0.3, 0.5, math.inf, 1e-3),
    "clipped": (0.3, -2.0, 0.25, 1e-3),
    "least": (0.1, 0.5, math.inf, 0.3),
}


def module_grads(grad, x, alpha, bits=2, scale=0.5, clip=math.inf):
    """The gradients of a StaircaseReLU's input and alpha."""
    grad_x, grad_alpha = oracles.staircase_grads(
        grad, x.to(grad.dtype), alpha, bits, "clipped_relu", "three_valued"
    )
    return grad_x, (scale * grad_alpha).clamp(-clip, clip)


def staircase_module():
    x, grad = uniform(4, 3, 5, high=2), uniform(4, 3, 5)
    values = {"x": x, "grad": grad}
    for name, (start, scale, clip, least) in MODULES.items():
        for kind, alpha in (("scalar", torch.tensor(start)), ("channels", torch.full((3,), start))):
            used = alpha.clamp_min(least)
            grad_x, grad_alpha = module_grads(grad, x, used, 2, scale, clip)
            values |= {
                f"{name}.{kind}.y": oracles.staircase(x, used, 2),
                f"{name}.{kind}.grad_x": grad_x,
                f"{name}.{kind}.grad_alpha": grad_alpha,
            }
    return values


ALPHA = 0.3  # of two bits, in front of each layer


def behind_a_staircase(name, x, layer, *params):
    """Values of layer(staircase(x), *params): output and gradients, in float64."""
    alpha = torch.tensor(ALPHA)
    y = oracles.staircase(x, alpha, 2).double().requires_grad_()
    real = [p.double().requires_grad_() for p in params]
    out = layer(y, *real)
    grad = uniform(*out.shape)
    grads = torch.autograd.grad(out, [y, *real], grad.double())
    grad_x, grad_alpha = module_grads(grads[0], x, alpha)
    values = {"x": x, "out": out.detach(), "grad": grad, "grad_x": grad_x, "grad_alpha": grad_alpha}
    for key, p, grad_p in zip(("weight", "bias"), params, grads[1:], strict=False):
        values |= {key: p, f"grad_{key}": grad_p}
    return {f"{name}.{key}": value for key, value in values.items()}


def padded(mode, *sides):
    return lambda y: F.pad(y, sides, mode=mode)


CONV2D = {  # name -> (padding of the input, options of the convolution, weight's shape, bias)
    "plain": (None, {}, (3, 4, 3, 3), True),
    "no_bias": (None, dict(stride=(2, 1), padding=(1, 2)), (3, 4, 3, 3), False),
    "groups": (None, dict(groups=2, dilation=(1, 2)), (4, 2, 2, 2), True),
    "same": (None, dict(padding="same"), (2, 4, 3, 3), True),
    "same_even": (padded("constant", 0, 1, 0, 1), {}, (2, 4, 2, 2), True),  # padding="same" of an even kernel
    "reflect": (padded("reflect", 2, 2, 1, 1), {}, (2, 4, 3, 3), True),
    "replicate": (padded("replicate", 2, 2, 1, 1), {}, (2, 4, 3, 3), True),
    "circular": (padded("circular", 2, 2, 1, 1), {}, (2, 4, 3, 3), True),
}
CONV1D = {
    "plain": (None, dict(stride=2, padding=1), (3, 4, 3), True),
    "groups": (None, dict(groups=4, dilation=2), (4, 1, 3), False),
    "same": (None, dict(padding="same"), (2, 4, 3), True),
    "same_even": (padded("constant", 0, 1), {}, (2, 4, 2), True),
    "circular": (padded("circular", 1, 1), {}, (2, 4, 3), True),
}
POOLS = {
    "plain": dict(kernel_size=2),
    "padded": dict(kernel_size=3, stride=2, padding=1),
    "ceil": dict(kernel_size=(2, 1), stride=(3, 2), ceil_mode=True),
    "dilated": dict(kernel_size=2, stride=1, dilation=(2, 1)),
}


def layers():
    values = {}
    for dims, cases, convolve in ((2, CONV2D, F.conv2d), (1, CONV1D, F.conv1d)):
        for case, (pad, options, shape, bias) in cases.items():
            x = uniform(2, 4, *((4, 5) if dims == 2 else (7,)), high=1.5)
            params = [uniform(*shape)] + ([uniform(shape[0])] if bias else [])

            def layer(y, w, b=None, pad=pad, options=options, convolve=convolve):
                return convolve(y if pad is None else pad(y), w, b, **options)

            values |= behind_a_staircase(f"conv{dims}d.{case}", x, layer, *params)
    values |= behind_a_staircase("linear.plain", uniform(3, 6, high=1.5), F.linear, uniform(4, 6), uniform(4))
    values |= behind_a_staircase("linear.no_bias", uniform(2, 3, 6, high=1.5), F.linear, uniform(4, 6))
    for case, options in POOLS.items():
        # The first of several largest is taken, by us and by torch.
        layer = lambda y, options=options: F.max_pool2d(y, **options)  # noqa: E731
        values |= behind_a_staircase(f"max_pool2d.{case}", uniform(2, 2, 5, 5, high=1.5), layer)
    return values


def batch_norm():
    """Two batches in training, then one that is evaluated; and a convolution before it."""
    values = {}
    for dims, shape in (("1d", (6, 3)), ("1d_long", (3, 3, 4)), ("2d", (2, 3, 3, 4))):
        for case, momentum, affine in (
            ("plain", 0.1, True),
            ("mean", None, True),
            ("not_affine", 0.4, False),
        ):
            name = f"{dims}.{case}"
            mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
            params = [uniform(3), uniform(3)] if affine else []

            def layer(y, w=None, b=None, training=True, momentum=0.0, mean=mean, var=var):
                return F.batch_norm(y, mean, var, w, b, training=training, momentum=momentum)

            for number in (1, 2, 3):
                share = 1 / number if momentum is None else momentum
                train = lambda *a, n=number, s=share, f=layer: f(*a, training=n < 3, momentum=s)  # noqa: E731
                values |= behind_a_staircase(f"{name}.{number}", uniform(*shape, high=1.5), train, *params)
            values |= {f"{name}.running_mean": mean, f"{name}.running_var": var}

    def convolved(y, w, b):
        return F.batch_norm(F.conv2d(y, w), None, None, None, b, training=True)

    values |= behind_a_staircase(
        "conv", uniform(2, 4, 4, 5, high=1.5), convolved, uniform(3, 4, 2, 2), uniform(3)
    )
    return values


# ---- distillation, calibration ----

FAQD = {
    "defaults": {},
    "kl": dict(kd="kl", temperature=2.0, lambda_kd=0.5),
    "kd_only": dict(lambda_fa=0.0, lambda_label=0.0),
    "fa_only": dict(lambda_kd=0.0, lambda_label=0.0, lambda_fa=2.0),
    "label_only": dict(lambda_kd=0.0, lambda_fa=0.0, lambda_label=0.7),
}


def faqd_terms(student, teacher, pairs, labels, *, kd="mse", temperature=4.0, lambda_kd=1.0, lambda_fa=10.0,
               lambda_label=0.3):  # fmt: skip
    """name -> (weight, value) of the terms of weight > 0."""
    log_s, log_t = ((z / temperature).log_softmax(1) for z in (student, teacher))
    kl = temperature**2 * (log_t.exp() * (log_t - log_s)).sum(1).mean()
    terms = {
        "kd": (lambda_kd, (student - teacher).square().mean() if kd == "mse" else kl),
        "fa": (lambda_fa, sum(oracles.feature_affinity(*pair) for pair in pairs)),
        "label": (lambda_label, F.cross_entropy(student, labels)),
    }
    return {name: term for name, term in terms.items() if term[0]}


def faqd_loss():
    values = {}
    for shape, size in (("flat", ()), ("dense", (2, 3))):
        student, teacher = uniform(4, 5, *size, low=-3, high=3), uniform(4, 5, *size, low=-3, high=3)
        labels = torch.randint(5, (4, *size))
        maps = [uniform(4, 2, 2, 2), uniform(4, 3, 2, 2), uniform(4, 3, 4), uniform(4, 2, 4)]
        values |= {f"{shape}.student": student, f"{shape}.teacher": teacher, f"{shape}.labels": labels}
        values |= {f"{shape}.map{i}": m for i, m in enumerate(maps)}
        for case, options in FAQD.items():
            inputs = [t.double().requires_grad_() for t in (student, maps[0], maps[2])]
            pairs = [(inputs[1], maps[1]), (inputs[2], maps[3])]
            terms = faqd_terms(inputs[0], teacher.double(), pairs, labels, **options)
            loss = sum(weight * value for weight, value in terms.values())
            grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
            values |= {f"{shape}.{case}.{name}": value.detach() for name, (_, value) in terms.items()}
            values |= {f"{shape}.{case}.loss": loss.detach()}
            values |= {f"{shape}.{case}.grad{i}": grad for i, grad in enumerate(grads)}
    return values


def resize_like():
    values = {}
    modes = {
        "1d": ("linear", (5,), (3,)),
        "2d": ("bilinear", (3, 4), (5, 2)),
        "3d": ("trilinear", (2, 3, 2), (3, 2, 4)),
    }
    for name, (mode, size, like) in modes.items():
        features = uniform(2, 2, *size)
        values |= {f"{name}.features": features, f"{name}.like": uniform(1, 1, *like)}
        for corners in (True, False):
            x = features.double()
            values[f"{name}.{corners}"] = F.interpolate(x, size=like, mode=mode, align_corners=corners)
    return values


def calibrate():
    batches = uniform(2, 500, 3) + uniform(2, 500, 3) * torch.tensor([0.2, 1.0, 3.0])
    values = {"batches": batches}
    for bits in (1, 2, 4, 8):
        for kind, parts in (("scalar", [batches]), ("channels", batches.unbind(2))):
            found = [oracles.best_step_size(x, bits) for x in parts]
            alpha, error = (torch.stack(v) if kind == "channels" else v[0] for v in zip(*found, strict=True))
            values |= {f"{bits}.{kind}.alpha": alpha, f"{bits}.{kind}.error": error}
    return values


FILES = (
    staircase_relu, quantize_weight, pack_codes, bcgd_step, feature_affinity_loss,
    staircase_module, layers, batch_norm, faqd_loss, resize_like, calibrate,
)  # fmt: skip


def write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for make in FILES:
        torch.manual_seed(0)
        values = {name: value.clone(memory_format=torch.contiguous_format) for name, value in make().items()}
        save_file(values, folder / f"{make.__name__}.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER)
    write(parser.parse_args().out)
