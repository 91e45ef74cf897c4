"""INT4 packing: the documented layout, byte by byte, and its round trip."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rrsq import kernels
from rrsq.kernels import pack_int4, unpack_int4, weight_operand

from .problems import make_problem, needs_triton

SIZES = [2, 6, 64, 96, 128, 576, 896]


def random_codes(out_features: int, in_features: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (out_features, in_features), generator=generator).to(torch.int8)


@given(in_features=st.sampled_from(SIZES), out_features=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing(in_features: int, out_features: int, seed: int) -> None:
    codes = random_codes(out_features, in_features, seed)
    packed = pack_int4(codes)
    assert packed.shape == (out_features, in_features // 2)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_int4(packed), codes)
    assert unpack_int4(packed).dtype == torch.int8


@pytest.mark.parametrize("in_features", SIZES)
def test_the_layout_is_the_documented_one(in_features: int) -> None:
    """Byte ``j`` of a block of ``b = gcd(in, 128)``: channel ``j`` low, channel ``j + b/2`` high, plus 8."""
    codes = random_codes(3, in_features, seed=in_features)
    packed = pack_int4(codes)
    block = math.gcd(in_features, 128)
    for row in range(3):
        for byte in range(in_features // 2):
            start = byte // (block // 2) * block
            channel = start + byte % (block // 2)
            low, high = int(codes[row, channel]) + 8, int(codes[row, channel + block // 2]) + 8
            assert int(packed[row, byte]) == low | high << 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_is_packed_alike(dtype: torch.dtype) -> None:
    codes = random_codes(4, 64, seed=0)
    assert torch.equal(pack_int4(codes.to(dtype)), pack_int4(codes))


@pytest.mark.parametrize("code", [-9, 8, 127])
def test_a_code_out_of_range_is_refused(code: int) -> None:
    codes = torch.zeros(2, 4, dtype=torch.int32)
    codes[1, 3] = code
    with pytest.raises(ValueError, match=r"\[-8, 7\]"):
        pack_int4(codes)


@pytest.mark.parametrize("in_features", [1, 3, 129])
def test_an_odd_number_of_channels_is_refused(in_features: int) -> None:
    with pytest.raises(ValueError, match="even number"):
        pack_int4(torch.zeros(2, in_features, dtype=torch.int8))


@pytest.mark.parametrize(("in_features", "group"), [(6, 2), (96, 32), (128, 128), (576, 64)])
def test_the_operand_is_code_times_multiplier(in_features: int, group: int) -> None:
    codes = random_codes(4, in_features, seed=1)
    multiplier = torch.randint(1, 16, (4, in_features // group), generator=torch.Generator().manual_seed(2))
    multiplier[::2] *= -1
    operand = weight_operand(pack_int4(codes), multiplier.to(torch.int8))
    assert torch.equal(operand[1::2], weight_operand(pack_int4(codes[1::2]), multiplier[1::2].byte()))
    for row in range(4):
        for channel in range(in_features):
            expected = int(codes[row, channel]) * int(multiplier[row, channel // group])
            assert int(operand[row, channel]) == expected


def test_the_largest_products_fit_int8() -> None:
    codes = torch.tensor([[-8, 7]], dtype=torch.int8)
    operand = weight_operand(pack_int4(codes), torch.tensor([[15]], dtype=torch.uint8))
    assert operand.tolist() == [[-120, 105]]
    operand = weight_operand(pack_int4(codes), torch.tensor([[-15]], dtype=torch.int8))
    assert operand.tolist() == [[120, -105]]


@needs_triton
@pytest.mark.parametrize("kind", ["random", "signed"])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("in_features", [64, 576, 100])
def test_unpacking(in_features, group_size, kind, device):
    if group_size and in_features % group_size:
        group_size = in_features // 2
    problem = make_problem(1, 37, in_features, group_size=group_size, kind=kind, device=device)
    with kernels.use_kernels("triton"):
        actual = kernels.weight_operand(problem.packed, problem.multiplier)
    with kernels.use_kernels("eager"):
        assert torch.equal(actual, kernels.weight_operand(problem.packed, problem.multiplier))


def run_assembly(source: str, *inputs: int) -> int:
    """What a few instructions of PTX on 32-bit registers leave in ``$0``, given ``$1``, ``$2``..."""
    registers = {f"${number}": value for number, value in enumerate(inputs, 1)}

    def read(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    def permuted(a: int, b: int, selector: int) -> int:
        source_bytes, result = (b << 32 | a).to_bytes(8, "little"), 0
        for place in range(4):
            which = selector >> 4 * place & 0xF
            byte = source_bytes[which & 7]
            if which & 8:  # Its sign, eight times.
                byte = 0xFF if byte & 0x80 else 0
            result |= byte << 8 * place
        return result

    operations = {
        "and.b32": lambda a, b: a & b,
        "xor.b32": lambda a, b: a ^ b,
        "shl.b32": lambda a, b: a << b,
        "shr.u32": lambda a, b: a >> b,
        "mad.lo.u32": lambda a, b, c: a * b + c,
        "prmt.b32": permuted,
    }
    for line in source.strip().strip("{}").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name and name != ".reg":
            into, *rest = (operand.strip() for operand in operands.split(","))
            registers[into] = operations[name](*map(read, rest)) & 0xFFFFFFFF
    return registers["$0"]


@needs_triton
@pytest.mark.parametrize("half", ["LOW", "HIGH"])
@pytest.mark.parametrize("multiplier", [number for number in range(-15, 16) if number])
def test_the_assembly_multiplies_four_codes_at_once(half: str, multiplier: int) -> None:
    source = getattr(sys.modules["rrsq.kernels.packing"], f"_SCALED_{half}").value
    for codes in ((-8, -8, -8, -8), (7, 7, 7, 7), (-8, 7, -1, 0), (0, 1, -8, 7), (7, -8, 3, -5)):
        nibbles = bytes((code + 8) << (4 if half == "HIGH" else 0) for code in codes)
        packed = int.from_bytes(nibbles, "little")
        result = run_assembly(source, packed, (multiplier & 0xFF) * 0x01010101)
        assert result.to_bytes(4, "little") == bytes(code * multiplier & 0xFF for code in codes)
