"""Instruments: memory, autograd's saved bytes, a GPU's clock, and what machine this is."""

import ctypes
import importlib.metadata
import math
import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

PEERS = ("torch", "torchao", "brevitas", "numpy", "triton")


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


class ColdEvents:
    """Times one call on the GPU, its own work alone: the cache is emptied first, by writes that also keep the
    GPU busy while the host launches the call, so that no gap between kernels is the host's."""

    WRITES = 8

    def __init__(self):
        self.flush = torch.empty(max(2 * cache_bytes(), 1 << 28), dtype=torch.uint8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call):
        for _ in range(self.WRITES):
            self.flush.zero_()
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3


def cache_bytes():
    """Of the GPU's L2."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def sets_beyond_cache(size, device):
    """How many sets of inputs of `size` bytes fill a GPU's cache twice, 8 at most; 1 on a CPU."""
    return 1 if device != "cuda" else min(8, math.ceil(2 * cache_bytes() / max(size, 1)))


def captured(call):
    """The call as a CUDA graph, ready to be replayed. One that waits for the device is refused before it is
    captured: a capture that fails leaves the allocator in a state that later captures would meet."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    mode = torch.cuda.get_sync_debug_mode()
    with torch.cuda.stream(stream):
        call()
        try:
            torch.cuda.set_sync_debug_mode("error")
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's numbers for mallopt


def tune_heap(option, value):
    try:
        ctypes.CDLL(None).mallopt(option, value)
    except AttributeError:  # another C library
        pass


def keep_freed_memory():
    """Puts the C library's heap into the state that it has in a program that has trained for a while: what is
    freed is kept, but for blocks above 32 MiB, which are new pages from the kernel each time. Else the
    accident of sizes decides which smaller results get new pages, and that takes longer than to fill them.
    """
    tune_heap(TRIM_THRESHOLD, 2**31 - 1)
    tune_heap(MMAP_THRESHOLD, 2**25)  # where glibc's own rule ends, which raises it as blocks are freed


def footprint(call, elements, saves, device):
    """Bytes that the call takes at its peak beyond what was there, all and per element, and bytes per element
    that its graph keeps."""
    if elements < 100_000:  # pages and allocator blocks would be all there is to see
        return {}
    peak = peak_bytes(call, device)
    result = {"peak_bytes": peak, "peak_bytes_per_element": per_element(peak, elements)}
    if saves:
        result["saved_bytes_per_element"] = per_element(saved_bytes(call), elements)
    return result


def per_element(size, elements):
    return None if size is None else size / elements


def saved_bytes(call):
    """Bytes of the distinct storages that the call's graph saves for backward, the input's included, without
    what it calls its weights."""
    storages = {}
    weights = {t.untyped_storage().data_ptr() for t in getattr(call, "weights", ())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in weights:
            return tensor
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(size for size, _ in storages.values())


def peak_bytes(call, device):
    """Peak of a call above where it began: the allocator's on a GPU, resident memory on Linux, else None."""
    if device == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    # In a thread of its own, whose heap is new, and with pages of its own for each larger block: in the heap
    # of a program that has run for a while, holes that earlier calls left decide how much of what was freed
    # is used again.
    tune_heap(MMAP_THRESHOLD, 2**17)
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(resident_peak, call).result()
    finally:
        keep_freed_memory()


def resident_peak(call):
    call()  # what libraries prepare for each thread is not the call's
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or memory freed before would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts anew
    except (OSError, AttributeError):
        return None
    before = resident_bytes("VmRSS")
    call()
    return max(0, resident_bytes("VmHWM") - before)


def resident_bytes(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def copy_of(size, device):
    """A call that moves `size` bytes, half of them read and half of them written."""
    source = torch.zeros(max(size // 2, 1), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def rates(device):
    """Best of ten: bytes per second of a large copy, flops per second of a float32 matrix product or of a
    3 x 3 convolution, whichever the libraries of this machine do better."""
    size, side = (1 << 31, 8192) if device == "cuda" else (1 << 28, 1024)
    square = torch.ones(side, side, device=device)
    product = torch.empty_like(square)
    copy = best(copy_of(size, device), device)
    gemm = 2 * side**3 / best(lambda: torch.mm(square, square, out=product), device)
    images, filters = torch.ones(16, 128, 16, 16, device=device), torch.ones(128, 128, 3, 3, device=device)
    convolution = best(lambda: torch.conv2d(images, filters, padding=1), device)
    convolved = 2 * images.numel() * filters[0].numel() / convolution
    return {"copy_bytes_per_s": size / copy, "flops_per_s": max(gemm, convolved)}


def best(call, device):
    seconds = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine(device):
    """What a reader needs to know to compare numbers."""
    import torchqat

    facts = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PEERS},
        "torchqat": {name: fact for name, fact in torchqat.build_info().items() if name != "library"},
        "checkout": checkout(),
    }
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def checkout():
    """The commit of the Python code and of the benchmarks; the library tells its own. None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
