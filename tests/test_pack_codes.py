"""pack_codes, unpack_codes: against the definition, bit for bit; layouts, compilers, vmap, bad input."""

import math
import os

import layouts
import oracles
import pytest
import torch
import torchqat.functional as F

WIDTHS = [1, 2, 4, 8]
# Around a word of eight codes, vectors of every instruction set, and what a thread of a GPU and a block take.
SIZES = [*range(0, 70), 127, 128, 129, 511, 512, 513, 8191, 8192, 8193]

LAYOUTS = layouts.LAYOUTS | {
    "0-dim": lambda **o: torch.zeros((), **o),
    "empty": lambda **o: torch.zeros(3, 0, 2, **o),
    "reversed": lambda **o: torch.zeros(2, 3, 11, **o).permute(2, 1, 0),
}


def random_codes(shape, bits, device="cpu"):
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, device=device)


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def expect_round_trip(codes, bits):
    packed = F.pack_codes(codes, bits)
    exactly(packed, oracles.packed_codes(codes, bits))
    assert packed.is_contiguous() and packed.shape == (math.ceil(codes.numel() * bits / 8),)
    again = F.unpack_codes(packed, bits, codes.shape)
    exactly(again, codes)
    assert again.is_contiguous()


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_number_of_codes(bits, device):
    for n in SIZES:
        expect_round_trip(random_codes((n,), bits, device), bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_of_every_layout_are_taken_in_row_major_order(layout, bits, device):
    codes = LAYOUTS[layout](device=device, dtype=torch.float32).mul(100).long().remainder(2**bits)
    codes = torch.empty_strided(codes.shape, codes.stride(), dtype=torch.uint8, device=device).copy_(codes)
    expect_round_trip(codes, bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_codes_and_bytes_that_begin_anywhere_and_lie_apart(offset, bits, device):
    for n in (5, 32, 1001):
        codes = random_codes((n,), bits, device)
        packed = oracles.packed_codes(codes, bits)
        for step in (1, 2):
            memory = torch.full((offset + step * n,), 255, dtype=torch.uint8, device=device)
            view = memory[offset::step][:n]
            exactly(F.pack_codes(view.copy_(codes), bits), packed)
            view = memory.fill_(255)[offset::step][: packed.numel()]
            exactly(F.unpack_codes(view.copy_(packed), bits, [n]), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_threads_share_out_does_not_change_the_result(bits):
    codes = random_codes((1_000_003,), bits)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        packed = F.pack_codes(codes, bits)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            exactly(F.pack_codes(codes, bits), packed)
            exactly(F.unpack_codes(packed, bits, codes.shape), codes)
    finally:
        torch.set_num_threads(before)
    end = 32_768 * 8  # of several threads' parts, and of one
    exactly(packed[: end // 8 * bits], F.pack_codes(codes[:end], bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_bits_that_no_code_fills_are_read_by_nobody(bits, device):
    codes = random_codes((8 // bits + 1,), bits, device)
    packed = F.pack_codes(codes, bits)
    if bits < 8:
        packed[-1] |= 0xFF << bits & 0xFF
    exactly(F.unpack_codes(packed, bits, codes.shape), codes)


def test_the_bytes_are_the_ones_that_numpy_packs():
    np = pytest.importorskip("numpy")
    codes = random_codes((1003,), 1)
    packed = np.packbits(codes.numpy(), bitorder="little")
    exactly(F.pack_codes(codes, 1), torch.from_numpy(packed))


def test_codes_of_the_other_operators_take_as_many_bits_as_they_have():
    x, alpha = torch.randn(5, 7, 9), torch.tensor(0.3)
    for bits in WIDTHS:
        codes = F.staircase_codes(x, alpha, bits)
        packed = F.pack_codes(codes, bits)
        assert packed.numel() == math.ceil(x.numel() * bits / 8)
        exactly(F.unpack_codes(packed, bits, x.shape), codes)


# ---- codes with more bits ----


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_code_with_more_bits_is_an_error_on_a_cpu(bits):
    for n, place in ((1, 0), (8, 3), (13, 12), (300_000, 299_999), (300_000, 5)):
        codes = torch.zeros(n, dtype=torch.uint8)
        codes[place] = 2**bits
        message = f"pack_codes: codes must be less than {2**bits} for bits={bits}, got {2**bits}"
        with pytest.raises(ValueError, match=message):
            F.pack_codes(codes, bits)
    codes = torch.zeros(3, 40, dtype=torch.uint8).t()
    codes[7, 1], codes[30, 2] = 129, 77
    with pytest.raises(ValueError, match=f"less than {2**bits} for bits={bits}, got 129"):
        F.pack_codes(codes, bits)
    exactly(F.pack_codes(torch.full((8,), 255, dtype=torch.uint8), 8), torch.full((8,), 255).byte())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_gpu_takes_the_low_bits(bits):
    codes = random_codes((5003,), 8, "cuda")
    exactly(F.pack_codes(codes, bits), oracles.packed_codes(codes % 2**bits, bits))


# ---- compilers and transforms ----


def both(codes, bits):
    packed = F.pack_codes(codes, bits)
    return packed, F.unpack_codes(packed, bits, codes.shape)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph_for_every_size(backend, bits, device):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(lambda c: both(c, bits), fullgraph=True, dynamic=True, backend=counting)
    for shape in ((3, 5), (4, 9), (7, 2)):
        codes = random_codes(shape, bits, device)
        exactly(compiled(codes), both(codes, bits))
    assert len(graphs) == 1


def test_compiles_where_the_size_depends_on_data(device):
    torch._dynamo.reset()
    options = dict(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda c: both(c[c > 1], 2), **options)
        for n in (31, 50):
            codes = random_codes((n,), 2, device)
            exactly(compiled(codes), both(codes[codes > 1], 2))


def test_a_compiled_unpacking_names_a_wrong_size():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda p, n: F.unpack_codes(p, 4, [n]), dynamic=True, fullgraph=True, backend="eager"
    )
    exactly(compiled(torch.tensor([0x21, 0x03]).byte(), 3), torch.tensor([1, 2, 3]).byte())
    with pytest.raises(Exception, match="unpack_codes: packed must have shape"):
        compiled(torch.zeros(2, dtype=torch.uint8), 9)


def test_exports_with_a_dynamic_size():
    class Both(torch.nn.Module):
        def forward(self, codes):
            return both(codes, 4)

    codes = random_codes((3, 6), 4)
    batch = torch.export.Dim("batch", min=2, max=1000)
    program = torch.export.export(Both(), (codes,), dynamic_shapes=({0: batch},))
    for n in (3, 8, 31):
        codes = random_codes((n, 6), 4)
        exactly(program.module()(codes), both(codes, 4))


@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_packs_each_sample_by_itself(in_dim, device):
    samples = random_codes((4, 3, 5), 2, device)  # 15 codes of 2 bits do not fill their last byte
    packed = torch.vmap(lambda c: F.pack_codes(c, 2), in_dim)(samples.movedim(0, in_dim))
    exactly(packed, torch.stack([F.pack_codes(c, 2) for c in samples]))
    again = torch.vmap(lambda p: F.unpack_codes(p, 2, [3, 5]), in_dim)(packed.movedim(0, in_dim % 2))
    exactly(again, samples)


def test_nested_vmap(device):
    samples = random_codes((2, 3, 7), 1, device)
    packed = torch.vmap(torch.vmap(lambda c: F.pack_codes(c, 1)))(samples)
    exactly(packed, torch.stack([torch.stack([F.pack_codes(c, 1) for c in row]) for row in samples]))


# ---- bad input ----


@pytest.mark.parametrize("bits", [0, 3, 5, 6, 7, 9, 16, -1, 2**40])
def test_other_widths_are_refused(bits):
    codes = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"^pack_codes: bits must be 1, 2, 4 or 8, got {bits}$"):
        F.pack_codes(codes, bits)
    with pytest.raises(ValueError, match=f"^unpack_codes: bits must be 1, 2, 4 or 8, got {bits}$"):
        F.unpack_codes(codes, bits, [8])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "dtype, named",
    [(torch.float32, "Float"), (torch.int8, "Char"), (torch.int64, "Long"), (torch.bool, "Bool")],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_other_dtypes_are_refused(dtype, named, requires_grad, device):
    codes = torch.zeros(8, dtype=dtype, device=device)
    if dtype == torch.float32:
        codes.requires_grad_(requires_grad)
    with pytest.raises(TypeError, match=f"^pack_codes: codes must be uint8, got {named}$"):
        F.pack_codes(codes, 2)
    with pytest.raises(TypeError, match=f"^unpack_codes: packed must be uint8, got {named}$"):
        F.unpack_codes(codes, 8, [8])


def test_sparse_tensors_are_refused():
    sparse = torch.eye(4, dtype=torch.uint8).to_sparse()
    with pytest.raises(TypeError, match="pack_codes: codes must be a dense tensor, got layout Sparse"):
        F.pack_codes(sparse, 2)
    with pytest.raises(TypeError, match="unpack_codes: packed must be a dense tensor, got layout Sparse"):
        F.unpack_codes(sparse, 2, [16])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "shape, bits, size, wanted",
    [
        ((3,), 4, [7], 4),
        ((5,), 4, [7], 4),
        ((0,), 1, [1], 1),
        ((1,), 1, [0, 5], 0),
        ((0,), 8, [], 1),
        ((2, 2), 4, [8], 4),
        ((), 8, [], 1),
        ((1,), 1, [2**31, 2**31], 2**59),
    ],
)
def test_a_wrong_number_of_bytes_is_refused(shape, bits, size, wanted, device):
    packed = torch.zeros(shape, dtype=torch.uint8, device=device)
    message = rf"packed must have shape \[{wanted}\] for {bits} bits and size .*, got shape \[.*\]$"
    with pytest.raises(ValueError, match="^unpack_codes: " + message):
        F.unpack_codes(packed, bits, size)


def test_sizes_that_cannot_be_are_refused():
    packed = torch.zeros(1, dtype=torch.uint8)
    for size in ([-1], [-2, -4], [0, -1]):
        with pytest.raises(ValueError, match="^unpack_codes: size must have no negative numbers, got "):
            F.unpack_codes(packed, 1, size)
    for size in ([2**32, 2**32], [2**62, 2]):
        with pytest.raises(
            ValueError, match="^unpack_codes: size must have fewer than 2\\^63 elements, got "
        ):
            F.unpack_codes(packed, 1, size)


# ---- large tensors ----


def free_gib():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@pytest.mark.slow
@pytest.mark.skipif(free_gib() < 6, reason="needs 6 GiB of free memory")
def test_more_than_2_to_the_31_codes():
    n = 2**31 + 9
    codes = torch.zeros(n, dtype=torch.uint8)
    codes[-11:] = 1
    packed = F.pack_codes(codes, 1)
    assert packed.shape == (2**28 + 2,) and packed[-4:].tolist() == [0, 0xC0, 0xFF, 1]
    del codes
    again = F.unpack_codes(packed, 1, [n])
    assert again.shape == (n,) and again[-12:].tolist() == [0] + [1] * 11 and again[:-11].max() == 0
