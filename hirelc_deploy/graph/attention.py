"""torch's own attention, as layers that can be stored, cut and computed like all others.

An `nn.MultiheadAttention` holds its projections as bare parameters and calls no layer: nothing of it could be
quantised, and no head removed.  In its place comes a module that computes the same by Linear layers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hirelc_deploy.graph.calling import forward, tensors


class PlainAttention(nn.Module):
    """What an nn.MultiheadAttention computes, by Linear layers; called as that is, on batches alone."""

    in_proj_bias = None
    """nn.TransformerEncoderLayer asks for it: with none it calls this module instead of reading weights past it."""

    def __init__(self, original: nn.MultiheadAttention, *, is_self: bool) -> None:
        """It takes the original's parameters; `is_self` says that queries, keys and values are of one tensor."""
        super().__init__()
        self.batch_first = original.batch_first
        self._qkv_same_embed_dim = original._qkv_same_embed_dim
        self.num_heads, self.head_dim = original.num_heads, original.head_dim
        self.dropout = original.dropout
        parts = _projections(original)
        if is_self:
            self.in_proj = _linear([weight for weight, _ in parts], [bias for _, bias in parts])
        else:
            self.q_proj, self.k_proj, self.v_proj = (_linear([weight], [bias]) for weight, bias in parts)
        self.out_proj = _linear([original.out_proj.weight], [original.out_proj.bias])
        self.train(original.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward, whose `is_causal` is a hint beside a mask that says the same."""
        q, k, v = (self._in_heads(each) for each in self._projected(query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        found = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return found if self.batch_first else found.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        if hasattr(self, "in_proj"):
            return self.in_proj(query).chunk(3, -1)
        return self.q_proj(query), self.k_proj(key), self.v_proj(value)

    def _in_heads(self, x: Tensor) -> Tensor:
        """(examples, heads, places, channels of a head)."""
        x = x if self.batch_first else x.transpose(0, 1)
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, places: Tensor | None, keys: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to scores: (places, keys) or one an example and head, and (examples, keys)."""
        found = None if places is None else _added(places, dtype)
        if found is not None and found.dim() == 3:
            found = found.unflatten(0, (-1, self.num_heads))
        if keys is not None:
            padding = _added(keys, dtype)[:, None, None]
            found = padding if found is None else found + padding
        return found


@torch.no_grad()
def _linear(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> nn.Linear:
    """One layer of several, on top of one another; all of them have a bias, or none."""
    weight, given = torch.cat([*weights]), [bias for bias in biases if bias is not None]
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(given), device="meta")  # nothing is drawn
    layer.weight = nn.Parameter(weight)
    if given:
        layer.bias = nn.Parameter(torch.cat(given))
    return layer


def _projections(original: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of queries, keys and values."""
    if original._qkv_same_embed_dim:
        weights: Sequence[Tensor] = original.in_proj_weight.chunk(3)
    else:
        weights = (original.q_proj_weight, original.k_proj_weight, original.v_proj_weight)
    biases = [None] * 3 if original.in_proj_bias is None else original.in_proj_bias.chunk(3)
    return list(zip(weights, biases, strict=True))


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of booleans, true where nothing is looked at, as what is added."""
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def with_plain_attention(model: nn.Module, example: Mapping[str, np.ndarray | Tensor]) -> nn.Module:
    """The network with a `PlainAttention` for every nn.MultiheadAttention that can have one; it is changed in place.

    What it is called with on one example says whether it looks at one tensor.  Left as they are: those that add a key
    of their own, share a parameter, are subclasses, are not called, or are called without an axis of examples.
    """
    found = {name: module for name, module in model.named_modules() if name and type(module) is nn.MultiheadAttention}
    counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    calls = _calls(model, example, found) if found else {}
    for name, module in found.items():
        own = [*module.parameters()]
        plain = module.bias_k is None and not module.add_zero_attn and all(counts[id(each)] == 1 for each in own)
        seen = calls.get(name, [])
        if not plain or not seen or any(is_single for _, is_single in seen):
            continue
        path, _, key = name.rpartition(".")
        setattr(model.get_submodule(path), key, PlainAttention(module, is_self=all(is_self for is_self, _ in seen)))
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            encoder.use_nested_tensor = False  # a way past layers as well
    return model


def _calls(
    model: nn.Module, example: Mapping[str, np.ndarray | Tensor], found: Mapping[str, nn.Module]
) -> dict[str, list[tuple[bool, bool]]]:
    """By module whether each call was of one tensor, and whether it had no axis of examples."""
    calls: dict[str, list[tuple[bool, bool]]] = {}

    def watch(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            query, key, value = (*args, *(kwargs[each] for each in ("query", "key", "value") if each in kwargs))[:3]
            calls.setdefault(name, []).append((query is key and key is value, query.dim() == 2))

        return before

    hooks = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in found.items()]
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():  # else an encoder reads weights past the module
            forward(model, tensors(example, 1))
    except Exception:  # whatever it is, it is told of where the network is traced
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return calls
