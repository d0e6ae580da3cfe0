"""One operator as a runtime executes it: what a row of a target's table is about.

A kernel is written as text, so that tables can be read and compared line by line:

    Conv        pads=1,1,1,1    x:1x64x28x28 w:128x64x3x3 w:128    int8
    Softmax     axis=-1         x:1x4x49x49                        fp32

`x` is what it reads when it runs, `w` what lies in the file, in the order of the operator's inputs; what is in square
brackets is a constant by its values, as the shape that a Reshape reads.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

from hirelc_deploy.policy import Compute

Role = Literal["x", "w"]

FLOAT_BYTES = 4
BYTES = {Compute.INT8: 1, Compute.FP8: 1, Compute.FP16: 2}
"""Of a value that is read or written, where it is not a float of 32 bits."""

FEW = 4
"""Input channels: an image itself is read by other code than what comes from a layer."""

_OPERAND = re.compile(r"(?P<role>[xw]):(?P<dims>(\d+(x\d+)*)?)|\[(?P<values>[^\]]*)\]")


@dataclass(frozen=True)
class Operand:
    """One input of a kernel: the shape of what it reads, or a small constant by its values."""

    role: Role
    shape: tuple[int, ...] = ()
    values: tuple[float | int, ...] | None = None
    """Where the values are what matters; floats are told from integers by their point."""

    def __str__(self) -> str:
        if self.values is not None:
            return f"[{','.join(map(number_text, self.values))}]"
        return f"{self.role}:{'x'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Kernel:
    """An operator of ONNX, its attributes, the shapes of its inputs and in what it computes."""

    op: str
    attributes: str
    """As `name=value` with spaces between, sorted; those that have their default are left out."""
    operands: tuple[Operand, ...]
    compute: Compute

    @classmethod
    def parse(cls, op: str, attributes: str, operands: str, compute: str) -> "Kernel":
        """The inverse of the texts.  Raises ValueError, with what is wrong, for a text that is no kernel."""
        if not re.fullmatch(r"\w+", op):
            raise ValueError(f"{op!r} is no operator")
        return cls(op, attributes, tuple(_operand(text) for text in operands.split()), Compute(compute))

    @property
    def operands_text(self) -> str:
        return " ".join(map(str, self.operands))

    def __str__(self) -> str:
        return f"{self.op} {self.attributes} {self.operands_text} {self.compute}".replace("  ", " ")

    # -- channels --------------------------------------------------------------------------------------------

    @cached_property
    def weight(self) -> tuple[int, ...] | None:
        """The shape of a layer's weight: its first `w` with two or more axes, where the operator has one."""
        found = [operand.shape for operand in self.operands if operand.role == "w" and len(operand.shape) > 1]
        return found[0] if self.op in LAYERS and found else None

    @property
    def reads_first(self) -> bool:
        """Whether a layer's weight has its inputs on the first axis: that of a Linear which is not transposed."""
        return self.op == "MatMul" or (self.op == "Gemm" and "transB=1" not in self.attributes)

    @cached_property
    def groups(self) -> int:
        found = re.search(r"\bgroup=(\d+)", self.attributes)
        return int(found[1]) if found else 1

    @property
    def is_transposed(self) -> bool:
        """Whether a convolution is a transposed one, whose weight has its inputs on the first axis."""
        return self.op == "ConvTranspose"

    @property
    def is_depthwise(self) -> bool:
        return self.weight is not None and self.groups > 1 and self.weight[1] == 1 and self.weight[0] == self.groups

    @cached_property
    def channels(self) -> tuple[int, int]:
        """(in, out): of a layer, those of its weight; of an image operator, both those that it reads; else (1, 1)."""
        shape = self.weight
        if shape is not None:
            if self.reads_first:
                return shape[-2], shape[-1]
            if self.op == "Gemm":
                return shape[1], shape[0]
            first, second = shape[0], shape[1] * self.groups
            return (first, second) if self.is_transposed else (second, first)
        read = self.operands[0].shape
        return (read[1], read[1]) if len(read) == 4 and self._scales else (1, 1)

    @property
    def has_one_count(self) -> bool:
        """Whether what it reads and what it writes have the same channels by what it is."""
        return self.weight is None or self.is_depthwise

    @property
    def _scales(self) -> bool:
        """Whether all that a weightless operator reads has the same channels, and nothing is a list of sizes."""
        shapes = {operand.shape for operand in self.operands if operand.values is None}
        return len(shapes) == 1 and all(len(operand.values or ()) <= 1 for operand in self.operands)

    def with_channels(self, inputs: int, outputs: int) -> "Kernel":
        """The same kernel for other numbers of channels (`inputs` alone counts where both are one number)."""
        shape = self.weight
        if shape is None:
            if self.channels == (1, 1):
                return self
            scaled = [
                operand if operand.values is not None else replace(operand, shape=_at(operand.shape, 1, inputs))
                for operand in self.operands
            ]
            return replace(self, operands=tuple(scaled))
        before = self.channels
        attributes = self.attributes
        if self.is_depthwise:
            outputs = inputs
            attributes = re.sub(r"\bgroup=\d+", f"group={inputs}", attributes)
        axis = 1 if self.op in IMAGE_LAYERS else len(self.operands[0].shape) - 1
        changed = []
        for operand in self.operands:
            if operand.values is not None:
                changed.append(operand)
            elif operand.role == "x":
                changed.append(replace(operand, shape=_at(operand.shape, axis, inputs)))
            elif len(operand.shape) > 1:
                changed.append(replace(operand, shape=self._weight_for(shape, inputs, outputs)))
            else:
                changed.append(replace(operand, shape=(outputs,) if operand.shape == (before[1],) else operand.shape))
        return replace(self, attributes=attributes, operands=tuple(changed))

    def _weight_for(self, shape: tuple[int, ...], inputs: int, outputs: int) -> tuple[int, ...]:
        if self.reads_first:
            return (inputs, outputs)
        if self.op == "Gemm":
            return (outputs, inputs)
        first, second = (inputs, outputs) if self.is_transposed else (outputs, inputs)
        return (first, 1 if self.is_depthwise else second // self.groups, *shape[2:])

    @cached_property
    def family(self) -> str:
        """What stays when channels change: kernels of one family are points of one function of the channels."""
        if self.channels == (1, 1):
            return str(self)
        few = f" of {self.channels[0]}" if self.weight is not None and self.channels[0] < FEW else ""
        if self.is_depthwise:
            return f"depthwise {self.with_channels(1, 1)}"
        return f"{self.with_channels(self.groups, self.groups)}{few}"

    # -- work ------------------------------------------------------------------------------------------------

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of a layer, or of a product of two activations; 0 for anything else."""
        read = self.operands[0].shape
        if self.weight is not None:
            if self.op in IMAGE_LAYERS:
                # a transposed one multiplies what it reads at each place, any other what it writes there
                return prod(self.weight) * (prod(read[2:]) if self.is_transposed else self._places) * read[0]
            return prod(self.weight) * prod(read[:-1])
        if self.op in ("MatMul", "FusedMatMul") and len(self.operands) > 1:
            return prod(read) * self.operands[1].shape[-1]
        return 0

    @cached_property
    def _places(self) -> int:
        """Positions of a convolution's output."""
        assert self.weight is not None
        size = self.operands[0].shape[2:]
        kernel = self.weight[2:]
        axes = len(size)
        strides = _integers(self.attributes, "strides") or (1,) * axes
        pads = _integers(self.attributes, "pads") or (0,) * (2 * axes)
        dilations = _integers(self.attributes, "dilations") or (1,) * axes
        if self.is_transposed:
            more = _integers(self.attributes, "output_padding") or (0,) * axes
            return prod(
                (size[i] - 1) * strides[i] - pads[i] - pads[i + axes] + dilations[i] * (kernel[i] - 1) + more[i] + 1
                for i in range(axes)
            )
        return prod(
            (size[i] + pads[i] + pads[i + axes] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1
            for i in range(axes)
        )

    @cached_property
    def bytes(self) -> int:
        """What it reads and writes, about: inputs, weights and, for a layer, outputs."""
        width = BYTES.get(self.compute, FLOAT_BYTES)
        read = sum(prod(operand.shape) for operand in self.operands if operand.values is None)
        if self.weight is None:
            return 2 * read * width
        batch = self.operands[0].shape[0]
        places = self._places * batch if self.op in IMAGE_LAYERS else prod(self.operands[0].shape[:-1])
        return (read + places * self.channels[1]) * width


IMAGE_LAYERS = ("Conv", "ConvTranspose")
LAYERS = (*IMAGE_LAYERS, "Gemm", "MatMul")
"""Operators that compute with a layer's weight."""

BORDERS = ("QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput")
"""Kernels that only change how a tensor is held: in integers or floats, by places or in blocks of channels."""


def kind_of(kernel: Kernel) -> str:
    """Kernels of one kind are alike in what limits them: they share a roofline and a correction."""
    if kernel.op in BORDERS:
        return "borders"
    if kernel.weight is not None:
        name = "depthwise" if kernel.is_depthwise else "Conv" if kernel.op.startswith("Conv") else "Linear"
        return f"{name} {kernel.compute}"
    return f"other {kernel.compute if kernel.compute in BYTES else Compute.FP32}"


def _integers(attributes: str, name: str) -> tuple[int, ...]:
    found = re.search(rf"\b{name}=([\d,]+)", attributes)
    # a list of one number ends with a comma
    return tuple(int(each) for each in found[1].split(",") if each) if found else ()


def _at(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _operand(text: str) -> Operand:
    found = _OPERAND.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no operand: x:1x64x28x28, w:64 or [1,-1]")
    if found["values"] is not None:
        return Operand("w", values=tuple(number_of(value) for value in found["values"].split(",") if value))
    role: Role = "x" if found["role"] == "x" else "w"
    return Operand(role, tuple(int(size) for size in found["dims"].split("x") if size))


def number_of(text: str) -> float | int:
    """The inverse of `number_text`.  Raises ValueError for a text that is no number."""
    return float(text) if any(mark in text for mark in ".einf") else int(text)


def number_text(value: object) -> str:
    """As a kernel's text has it: floats keep a point, by which they are told from integers."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.6g}"
    return text if any(mark in text for mark in ".en") else f"{text}.0"


ABSENT = Operand("w", values=())
"""An optional input that is left out, written []."""
