"""What stands in a network where a branch was: a residual block becomes its shortcut, its layers leave the network."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hirelc_deploy.graph.model_graph import Vanishing

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
SILENT = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "dropout", "permute", "transpose"}
"""Functions of torch, by name, that make nothing of nothing."""


class Nothing:
    """What a branch that is gone gives: added to a tensor it leaves it as it is; scaled or rearranged it stays nothing.

    No tensor of zeros: `out += shortcut`, which most networks write, could not broadcast into a small one, and a full
    one would be computed and added in the file.  Everything else that meets it raises TypeError: a gate that is
    silenced (sigmoid(0) is a half) is no branch that goes.
    """

    def __add__(self, other: "Tensor | Nothing") -> "Tensor | Nothing":
        # A copy, since what follows the addition may work in place on what it takes for a fresh result.
        return other.clone() if isinstance(other, Tensor) else self

    __radd__ = __add__

    def __mul__(self, other: object) -> "Nothing":
        return self

    __rmul__ = __mul__

    def permute(self, *dims: int) -> "Nothing":
        return self

    transpose = permute

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """torch asks here whenever one of its functions meets Nothing."""
        name = getattr(func, "__name__", "")
        if name in ADDITIONS:
            return args[0] + args[1] if isinstance(args[0], cls) else args[1] + args[0]
        if name in SILENT:
            return next(arg for arg in args if isinstance(arg, cls))
        raise TypeError(f"{name or func} of a branch that is gone")


class Gone(nn.Module):
    """In the place of a branch's last layer."""

    def forward(self, x: Tensor) -> Nothing:
        return Nothing()


class Bypass(nn.Module):
    """In the place of a module that serves nothing but a branch that is gone.

    A copy, since an activation behind it may work in place, and would now do so on the shortcut's own tensor.
    """

    def forward(self, x: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) else x


class Blank(nn.Module):
    """In the place of a projection that serves nothing but a branch that is gone: zeros, as wide as its result was.

    What lies between the two may reshape by numbers that stand in the forward pass, as heads are told apart; nobody
    reads what comes of it, and no file has it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Any) -> Any:
        return x.new_zeros(*x.shape[:-1], self.width) if isinstance(x, Tensor) else x


def vanish(model: nn.Module, vanishing: Iterable[Vanishing]) -> None:
    """Replace the modules of branches that go, in place; the paths of all others stay."""
    for branch in vanishing:
        for name in branch.bypassed:
            module = model.get_submodule(name)
            _stand_in(model, name, Blank(module.out_features) if isinstance(module, nn.Linear) else Bypass())
        for name in branch.silenced:
            _stand_in(model, name, Gone())


def _stand_in(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place, with its settings: a network may ask a layer for its stride to pad by itself."""
    settings = {key: value for key, value in vars(model.get_submodule(name)).items() if not key.startswith("_")}
    vars(module).update(settings)
    replace(model, name, module)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, key = name.rpartition(".")
    setattr(model.get_submodule(path), key, module)
