"""Codes of 1 to 16 bits as planes of 16, 8, 4, 2 and 1 bits, each of which fills its bytes.

A 3-bit code has its upper two bits in one plane and the lowest in another.  A byte holds the bits of codes that lie a
fixed distance apart, so that one shift of all bytes by several amounts gives all codes in order.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

    from hirelc_deploy.kernels._base import Nodes

WIDTHS = (16, 8, 4, 2, 1)


def planes(bits: int) -> tuple[int, ...]:
    """The widths that make up a code, highest bits first: 3 = 2 + 1, 12 = 8 + 4."""
    return tuple(width for width in WIDTHS if bits & width)


def code_type(bits: int) -> type[np.unsignedinteger[Any]]:
    """Of an array of codes with so many bits."""
    return np.uint8 if bits <= 8 else np.uint16


def in_byte(width: int) -> int:
    """How many codes, or parts of codes, a byte holds whole; a wider one lies alone."""
    return max(8 // width, 1)


def padded(codes: int, bits: int) -> int:
    """The number of codes with those that fill up the last byte of each plane."""
    together = in_byte(min(planes(bits)))
    return -(-codes // together) * together


def plane_bytes(codes: int, bits: int) -> int:
    """Bytes of all planes."""
    return padded(codes, bits) * bits // 8


def split(codes: np.ndarray, bits: int) -> list[np.ndarray]:
    """The planes of codes (n,), which are of their `code_type`; a plane is so of its width.

    16 bits are one plane: it is read by one cast, where two bytes would be cast, multiplied and added.
    """
    filled = np.zeros(padded(len(codes), bits), codes.dtype)
    filled[: len(codes)] = codes
    below = bits
    stored = []
    for width in planes(bits):
        below -= width
        part = (filled >> below) & (2**width - 1)
        by_shift = part.astype(code_type(width)).reshape(in_byte(width), -1) << _shifts(width)
        stored.append(np.bitwise_or.reduce(by_shift, axis=0).astype(code_type(width)))
    return stored


def join(stored: Sequence["ir.Value"], bits: int, nodes: "Nodes") -> "ir.Value":
    """Nodes from planes to codes: int32, (padded,)."""
    wide = bits > 8  # in bytes as long as they hold a code: whatever is cast to int32 takes four times the memory
    code: ir.Value | None = None
    for plane, width in zip(stored, planes(bits), strict=True):
        part = plane
        if width < 8:
            shifted = nodes.op("BitShift", plane, nodes.constant(_shifts(width)), direction="RIGHT")
            masked = nodes.op("BitwiseAnd", shifted, nodes.constant(np.array(2**width - 1, np.uint8)))
            part = nodes.op("Reshape", masked, nodes.constant(np.array([-1], np.int64)))
        if wide:
            part = nodes.op("Cast", part, to=_INT32)
        if code is not None and wide:
            above = nodes.op("Mul", code, nodes.constant(np.array(2**width, np.int32)))
            part = nodes.op("Add", above, part)
        elif code is not None:
            above = nodes.op("BitShift", code, nodes.constant(np.array(width, np.uint8)), direction="LEFT")
            part = nodes.op("BitwiseOr", above, part)
        code = part
    assert code is not None
    return code if wide else nodes.op("Cast", code, to=_INT32)


def _shifts(width: int) -> np.ndarray:
    return np.arange(0, 8, width, dtype=np.uint8)[:, None]


_INT32 = 6  # onnx.TensorProto.INT32
