"""The PTX of :mod:`rrsq.kernels.warp_attention`, executed by a warp of 32 lanes in numpy.

Triton's interpreter refuses inline assembly. With :func:`execute_assembly` in its place, the kernel runs
where there is no GPU, instruction by instruction: what each lane loads, unpacks, multiplies and stores.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

LANES = 32
Register = np.ndarray[Any, Any]


def _halves(x: Register) -> Register:
    """Words as float16 ``[lanes, 2]``, the lower first."""
    return x.view(np.uint32).reshape(LANES, 1).view(np.float16)


def _words(x: Register) -> Register:
    """The other way."""
    return np.ascontiguousarray(x.astype(np.float16)).view(np.uint32).reshape(LANES)


def _permuted(a: Register, b: Register, selector: Register) -> Register:
    both = np.concatenate([x.view(np.uint32).reshape(LANES, 1).view(np.uint8) for x in (a, b)], axis=1)
    places = np.broadcast_to(selector, LANES).astype(np.int64)
    chosen = np.stack([both[np.arange(LANES), places >> 4 * byte & 7] for byte in range(4)], axis=1)
    return np.ascontiguousarray(chosen).view(np.uint32).reshape(LANES)


def _matrix(registers: list[Register], columns: bool) -> Register:
    """Float16 fragments as a matrix: of ``A`` 16 rows by 16, of ``B`` (``columns``) 8 columns by 16."""
    matrix = np.zeros((8 if columns else 16, 16))
    for index, register in enumerate(registers):
        row, begin = (0, 8 * index) if columns else (8 * (index % 2), 8 * (index // 2))
        for lane in range(LANES):
            first = begin + 2 * (lane % 4)
            matrix[row + lane // 4, first : first + 2] = _halves(register)[lane]
    return matrix


def _mma(operands: list[Register]) -> list[Register]:
    """``mma.m16n8k16``: A of four registers, B of two, C of four; the result's four."""
    with np.errstate(invalid="ignore"):
        product = _matrix(operands[:4], False) @ _matrix(operands[4:6], True).T
    results = []
    lanes = np.arange(LANES)
    for index, addend in enumerate(operands[6:]):
        own = product[lanes // 4 + 8 * (index // 2), 2 * (lanes % 4) + index % 2]
        results.append((addend.view(np.float32) + own).astype(np.float32))
    return results


def _transposed(x: Register) -> Register:
    """``movmatrix``: of 8 x 8 numbers of 16 bits, two a lane."""
    matrix = x.view(np.uint32).reshape(LANES, 1).view(np.uint16).reshape(8, 8)
    return np.ascontiguousarray(matrix.T).reshape(LANES, 2).view(np.uint32).reshape(LANES)


def _from_lane(x: Register, distance: Register) -> Register:
    return x[np.arange(LANES) ^ int(distance)]


def _float(x: Register) -> Register:
    return x.view(np.float32)


OPERATIONS: dict[str, Callable[..., Register]] = {
    "shl.b32": lambda a, b: (a.view(np.uint32).astype(np.uint64) << np.uint64(b)).astype(np.uint32),
    "shr.u32": lambda a, b: a.view(np.uint32) >> np.uint32(b),
    "mov.b32": lambda a: np.broadcast_to(a, LANES).copy(),
    "mov.f32": lambda a: a.copy(),
    "prmt.b32": _permuted,
    "sub.f16x2": lambda a, b: _words(_halves(a) - _halves(b)),
    "mul.f16x2": lambda a, b: _words(_halves(a) * _halves(b)),
    "cvt.f32.f16": lambda a: a.view(np.float16).astype(np.float32),
    "cvt.rn.f16x2.f32": lambda high, low: _words(np.stack([_float(low), _float(high)], axis=1)),
    "movmatrix.sync.aligned.m8n8.trans.b16": _transposed,
    "shfl.sync.bfly.b32": lambda a, distance, _, __: _from_lane(a, distance),
    "max.f32": lambda a, b: np.fmax(_float(a), _float(b)),
    "add.f32": lambda a, b: _float(a) + _float(b),
}


def _and_or(a: Register, b: Register, c: Register, table: Register) -> Register:
    assert int(table) == 0xEA
    return a.view(np.uint32) & np.uint32(b) | np.uint32(c)


OPERATIONS["lop3.b32"] = _and_or


def _execute(source: str, registers: dict[str, Register]) -> None:
    def read(operand: str) -> Register:
        return registers[operand] if operand in registers else np.uint32(int(operand, 0))  # type: ignore[return-value]

    body = source.strip()
    if not body.startswith("mma"):
        body = body.removeprefix("{").removesuffix("}")
    for instruction in body.split(";"):
        name, _, rest = instruction.strip().partition(" ")
        if not name or name == ".reg" or name.startswith(".reg"):
            continue
        # Operands in braces are vectors.
        operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        vectors = [re.findall(r"[^{},\s]+", operand) for operand in operands]
        into = vectors[0]
        if name.startswith("mma"):
            results = _mma([read(each) for vector in vectors[1:] for each in vector])
        elif name.startswith("mov") and len(into) == 2:
            kind = np.uint16 if name == "mov.b32" else np.uint32
            parts = np.ascontiguousarray(read(vectors[1][0])).reshape(LANES, 1).view(kind)
            results = [np.ascontiguousarray(parts[:, index]) for index in range(2)]
        else:
            results = [OPERATIONS[name](*(read(vector[0]) for vector in vectors[1:]))]
        registers.update(zip(into, results, strict=True))


class _Results(list[Any]):
    def get_result(self, index: int) -> Any:
        """What Triton asks a call for."""
        return self[index]


def execute_assembly(
    _: object, source: str, constraints: str, values: list[Any], types: list[Any], __: bool, pack: int
) -> _Results:
    """In place of ``InterpreterBuilder.create_inline_asm``: values of 32 lanes, one element a time."""
    assert pack == 1
    outputs = [constraint.strip().startswith("=") for constraint in constraints.split(",")].count(True)
    kinds = {4: np.uint32, 8: np.uint64}
    registers: dict[str, Register] = {}
    for index, value in enumerate(values):
        data = np.ascontiguousarray(value.data)
        assert data.shape == (LANES,)
        registers[f"${outputs + index}"] = data.view(kinds[data.itemsize])
    _execute(source, registers)
    results = _Results()
    handle = type(values[0])
    for index, kind in enumerate(types):
        scalar = kind.scalar
        numbers = np.float32 if scalar.is_floating() else np.int32
        results.append(handle(np.ascontiguousarray(registers[f"${index}"]).view(numbers), scalar))
    return results
