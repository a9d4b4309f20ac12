"""One call of each operator at a size that fills a GPU, for Nsight Compute:

    ncu --profile-from-start off --kernel-name-base demangled --kernel-name regex:torchqat::cuda \\
        python scripts/profiled_kernels.py

Only the second call of each is profiled: the first makes what is made once. scripts/gpu_check.sh adds the
metrics.
"""

import torch
from torchqat import functional as F

ELEMENTS = 1 << 26


def staircase(ste, dtype, alpha_grad="three_valued"):
    x = torch.randn(ELEMENTS // 2**14, 64, 16, 16, device="cuda", dtype=dtype, requires_grad=True)
    alpha = torch.full((), 0.4, device="cuda", requires_grad=True)
    grad = torch.ones_like(x)

    def call():
        y = F.staircase_relu(x, alpha, 2, ste=ste, alpha_grad=alpha_grad)
        torch.autograd.grad(y, (x, alpha), grad)

    return call


def weights(bits, method="exact"):
    weight = torch.randn(2048, 2048, device="cuda")

    def call():
        _, scale = F.quantize_weight(weight, bits, method=method)
        F.weight_codes(weight, scale, bits)

    return call


def packing():
    codes = torch.randint(0, 4, (ELEMENTS,), device="cuda", dtype=torch.uint8)
    return lambda: F.unpack_codes(F.pack_codes(codes, 2), 2, [ELEMENTS])


def step(bits):
    """The parameters of a network like ResNet-18."""
    shapes = [(64 * 2**i, 64 * 2**i, 3, 3) for i in range(4) for _ in range(4)]
    params, grads, latents, buffers = ([torch.randn(s, device="cuda") for s in shapes] for _ in range(4))
    scales, steps = ([torch.ones((), device="cuda") for _ in shapes] for _ in range(2))
    lr = torch.tensor(0.01)
    return lambda: F.bcgd_step_(
        params, grads, latents, scales, buffers, steps, lr=lr, bits=bits, momentum=0.9
    )


def affinity(dtype):
    student, teacher = (torch.rand(8, 128, 28, 28, device="cuda", dtype=dtype) for _ in range(2))
    student.requires_grad_()
    return lambda: torch.autograd.grad(F.feature_affinity_loss(student, teacher), student)


CALLS = {
    "staircase_relu": lambda: staircase("clipped_relu", torch.float32),
    "staircase_relu, bfloat16": lambda: staircase("clipped_relu", torch.bfloat16),
    "staircase_relu, x kept": lambda: staircase("reverse_exponential", torch.float32, "exact"),
    "pack_codes": packing,
    "quantize_weight, 1 bit": lambda: weights(1),
    "quantize_weight, 4 bits": lambda: weights(4),
    "bcgd_step_, 1 bit": lambda: step(1),
    "bcgd_step_, 2 bits": lambda: step(2),
    "bcgd_step_, 4 bits": lambda: step(4),
    "feature_affinity_loss": lambda: affinity(torch.float32),
    "feature_affinity_loss, bfloat16": lambda: affinity(torch.bfloat16),
}


def main():
    for name, make in CALLS.items():
        call = make()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(name, flush=True)


if __name__ == "__main__":
    main()
