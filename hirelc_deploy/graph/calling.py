"""The one way in which the pass calls a network: inputs by name in, tensors by name out."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hirelc_deploy.errors import UserError

Inputs = Mapping[str, Tensor]
"""One batch by input name; the first axis is the example."""


def forward(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The network's outputs by name, whatever it returns.

    Inputs go by keyword where `forward` has parameters of these names or hands on whatever it is given
    (`goes_by_keyword`), else by position in their order.
    A tensor is called `output`, the items of a tuple or list `output_0`, `output_1` …, those of a mapping
    (and of a transformers ModelOutput) by their keys; nested names are joined by dots.  None is dropped.
    It is given copies: a network may work on its input in place (`x.sub_(mean)`), and inputs are used again.
    Raises UserError for a result that holds anything else, or nothing.
    """
    inputs = {name: tensor.clone() for name, tensor in inputs.items()}
    result = model(**inputs) if goes_by_keyword(model, inputs) else model(*inputs.values())
    outputs = dict(_tensors_in(result, ""))
    if not outputs:
        raise UserError("the model returned no tensor", fix="let forward return a tensor, or a tuple or dict of them")
    return outputs


def goes_by_keyword(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether `forward` has parameters of all these names; one that hands on whatever it is given, as wrappers do, has
    those of what it wraps."""
    accepted = inspect.signature(model.forward).parameters
    wanted = list(names)
    if all(name in accepted for name in wanted):
        return True
    kinds = {parameter.kind for parameter in accepted.values()}
    if kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        # one input alone is not taken for another, and what is wrapped may call it by another name
        return len(wanted) > 1
    return kinds == {inspect.Parameter.VAR_KEYWORD}


def _tensors_in(result: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if result is None:
        return
    if isinstance(result, Tensor):
        yield name or "output", result
        return
    if hasattr(result, "_asdict"):  # a NamedTuple
        result = result._asdict()
    if isinstance(result, Mapping):
        items = [(str(key), value) for key, value in result.items()]
    elif isinstance(result, (tuple, list)):
        items = [(str(i) if name else f"output_{i}", value) for i, value in enumerate(result)]
    else:
        raise UserError(
            f"the model returned a {type(result).__name__}{f' in {name}' if name else ''}",
            fix="let forward return tensors, or tuples or dicts of them (transformers: config.use_cache = False)",
        )
    for key, value in items:
        yield from _tensors_in(value, f"{name}.{key}" if name else key)


def tensors(arrays: Mapping[str, np.ndarray | Tensor], examples: int | None = None) -> dict[str, Tensor]:
    """A batch as tensors, its first `examples` examples where a number is given.  Raises UserError if it is empty."""
    batch = {name: torch.as_tensor(array)[:examples] for name, array in arrays.items()}
    empty = [name for name, tensor in batch.items() if tensor.ndim == 0 or len(tensor) == 0]
    if empty or not batch:
        raise UserError(
            f"the example's input {empty[0]!r} holds no example" if empty else "the example has no inputs",
            fix="an example is a mapping of input name to array, whose first axis is the example",
        )
    return batch
