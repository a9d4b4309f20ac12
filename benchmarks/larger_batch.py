"""Which batch fits: trains in processes that may take so much memory and no more.

    python benchmarks/larger_batch.py            ResNet-20, 256 images in float, 384 and 768 quantized
    python benchmarks/larger_batch.py --memory 400 --batch 128

Each process gets an address space of what it has when everything is set up, and --memory MiB more
(RLIMIT_AS). Linux only. The exit status is 0 if the float network fails at the batch, and the quantized one
(binary weights, 2-bit activations) trains at 1.5 times it.
"""

import argparse
import resource
import subprocess
import sys

import torch
import torchqat
from meters import MMAP_THRESHOLD, resident_bytes, tune_heap
from torch.nn import functional as F

STEPS = 3


def main():
    options = arguments()
    if options.kind:
        return train(options)
    runs = [("float", 1), ("codes", 1), ("codes", 1.5), ("recompute", 3)]
    print(f"{options.network}, {options.memory} MiB beyond what the process has before it trains\n")
    print("| network | batch | |\n|---|---|---|")
    outcomes = {}
    for kind, factor in runs:
        batch = round(factor * options.batch)
        command = [sys.executable, __file__, "--network", options.network, "--memory", str(options.memory)]
        command += ["--batch", str(batch), "--kind", kind]
        result = subprocess.run(command, capture_output=True, text=True)
        outcomes[kind, factor] = result.returncode == 0
        lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
        print(
            f"| {kind} | {batch} | {lines[-1] if lines else f'killed by {-result.returncode}'} |", flush=True
        )
    sys.exit(0 if outcomes["codes", 1.5] and not outcomes["float", 1] else 1)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--network", default="resnet20", help="one of the examples' networks")
    parser.add_argument("--batch", type=int, default=256, help="images of 3 x 32 x 32")
    parser.add_argument("--memory", type=int, default=360, metavar="MIB")
    parser.add_argument("--kind", choices=("float", "codes", "recompute"), help=argparse.SUPPRESS)
    return parser.parse_args()


def train(options):
    from networks import floats, network

    torch.set_num_threads(1)
    tune_heap(MMAP_THRESHOLD, 2**17)  # what is freed goes back: no holes of a heap, for either network
    model = network(options.network, 32)
    if options.kind == "float":
        optimizer = torch.optim.SGD(floats(model).parameters(), lr=0.01, momentum=0.9)
    else:
        torchqat.prepare(model, 2, recompute=options.kind == "recompute")
        optimizer = torchqat.optim.BCGD(torchqat.optim.param_groups(model, 1), lr=0.01, momentum=0.9)
    images, labels = torch.randn(options.batch, 3, 32, 32), torch.arange(options.batch) % 10

    def step(count):
        loss = F.cross_entropy(model(images[:count]), labels[:count])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    step(8)  # what libraries and the optimizer set up
    limit = resident_bytes("VmSize") + options.memory * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    losses = [step(options.batch) for _ in range(STEPS)]
    print(f"trains: losses {', '.join(f'{loss:.3f}' for loss in losses)}")


if __name__ == "__main__":
    main()
