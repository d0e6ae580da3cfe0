"""A network and its trained weights, from what the user names.

Nothing in a checkpoint is ever executed: .pt and .pth are read with weights_only=True, .safetensors holds numbers
only.  The only code of the user's that runs is the file or module that `--model` names.
"""

import hashlib
import importlib
import pickle
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hirelc_deploy.config import nearest
from hirelc_deploy.copying import copied
from hirelc_deploy.errors import UserError
from hirelc_deploy.usercode import call, is_callable_spec, reading

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "student")
"""Under which training scripts put the weights; looked for in this order, in nested wrappers too."""
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
"""Likewise for averaged weights: taken only where there are no others."""
PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.", "backbone.", "encoder.", "ema_model.")
"""What DataParallel, Lightning, torch.compile and wrappers of that kind write before every name."""
SHOWN = 3  # names in a message; the rest is counted
PLAUSIBLE = 0.5  # below this share of names in common it is a checkpoint of another network


@dataclass(frozen=True)
class Checkpoint:
    """A trained network, ready to be traced: on the CPU, eval mode, float32, gradients on."""

    model: nn.Module
    spec: str
    sha256: str
    """Of the weights, whatever file they came in."""


def load(model_spec: str, checkpoint: Path | None = None) -> Checkpoint:
    """The network that `model_spec` names with the weights of `checkpoint`, or with its own if that is None.

    Specs: FILE.py:callable, package.module:callable, timm:NAME, torchvision:NAME, hf:FOLDER.
    Raises UserError if it cannot be built, if names or shapes differ, or if a weight is NaN or infinite.
    """
    model = build(model_spec, with_weights=checkpoint is None)
    if checkpoint is not None:
        _fill(model, read_weights(checkpoint), checkpoint, model_spec)
    return _ready(model, model_spec, where=checkpoint.name if checkpoint else model_spec)


def _ready(model: nn.Module, spec: str, *, where: str) -> Checkpoint:
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise UserError(
            f"{spec} has weights that have no shape before it has run: {_some(lazy)}",
            fix="run it once on an example where it is built, or name the numbers of inputs",
        )
    if next(model.children(), None) is None:
        model = nn.Sequential(model)  # a layer has its name from the module that it is in
    model = model.cpu().float().eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    _check_finite(model, where)
    return Checkpoint(model, spec, weights_sha256(model.state_dict()))


def of(model: nn.Module, spec: str) -> Checkpoint:
    """A network that is in memory already, copied: the caller's stays as it is.  Raises UserError for NaN weights."""
    return _ready(copied(model), spec, where=spec)


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names in sorted order, each with dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# The network


def build(spec: str, *, with_weights: bool) -> nn.Module:
    """The network that `spec` names.  With `with_weights` it has to bring trained weights itself."""
    source, _, name = spec.partition(":")
    if source == "hf":
        return _from_transformers(Path(name), with_weights)
    if source in ("timm", "torchvision"):
        if with_weights:
            raise UserError(
                f"{spec} alone is a network with random weights",
                fix="give its trained weights with --checkpoint (torch.save(model.state_dict(), FILE))",
            )
        return _from_timm(name) if source == "timm" else _from_torchvision(name)
    if is_callable_spec(spec):
        return _module(call(spec), spec)
    raise UserError(
        f"--model {spec} names no network",
        fix="write FILE.py:callable, package.module:callable, timm:NAME, torchvision:NAME or hf:FOLDER",
    )


def _module(built: Any, spec: str) -> nn.Module:
    if not isinstance(built, nn.Module):
        raise UserError(
            f"{spec} returned a {type(built).__name__}, not a torch.nn.Module",
            fix="return the network itself; its weights come from --checkpoint",
        )
    return built


def _from_timm(name: str) -> nn.Module:
    _torchvision_schemas()
    timm = _installed("timm", extra="timm")
    if not timm.is_model(name):
        raise UserError(f"timm has no network {name!r}", fix=f"did you mean {nearest(name, timm.list_models())}?")
    return _module(timm.create_model(name, pretrained=False), f"timm:{name}")


def _from_torchvision(name: str) -> nn.Module:
    _torchvision_schemas()
    models = _installed("torchvision", extra="torchvision").models
    if name not in models.list_models():
        raise UserError(
            f"torchvision has no network {name!r}", fix=f"did you mean {nearest(name, models.list_models())}?"
        )
    return _module(models.get_model(name, weights=None), f"torchvision:{name}")


def _from_transformers(folder: Path, with_weights: bool) -> nn.Module:
    """A network that `save_pretrained` wrote, as the class that its config names; code in the folder is not run."""
    transformers = _installed("transformers", extra="transformers")
    with reading(folder):
        (folder / "config.json").stat()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = _transformers_class(transformers, config, folder)
        if not with_weights:
            return _module(kind(config), f"hf:{folder}")
        model, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"transformers cannot load {folder}: {first_line}", fix="write it again with model.save_pretrained(FOLDER)"
        ) from error
    if info["missing_keys"]:  # transformers fills them with random numbers and only warns
        raise UserError(f"the weights in {folder} lack {_some(info['missing_keys'])}", fix="save the whole model again")
    return _module(model, f"hf:{folder}")


def _transformers_class(transformers: ModuleType, config: Any, folder: Path) -> Any:
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise UserError(
            f"{folder / 'config.json'} names no class that transformers has: architectures is {names}",
            fix="save it with model.save_pretrained(FOLDER) from a class of transformers",
        )
    return kind


def _installed(package: str, *, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise UserError(f"{package} is not installed", fix=f"pip install 'hirelc-deploy[{extra}]'") from error


_SCHEMAS: list[torch.library.Library] = []
"""Definitions live as long as their library object."""


def _torchvision_schemas() -> None:
    """Let torchvision be imported where its compiled operators cannot be loaded.

    A torchvision built for CUDA beside a torch built for the CPU fails at import with `operator torchvision::nms does
    not exist`, although no classifier calls it.  Declared without a kernel, the operators satisfy the import, and
    calling one still fails.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return  # timm says itself what it needs
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SCHEMAS.append(library)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
        importlib.import_module("torchvision")


# The weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name, without its wrappers.  Raises UserError if it holds none, or code."""
    match path.suffix:
        case ".safetensors":
            return _read_safetensors(path)
        case ".pt" | ".pth":
            return _unwrap(_read_pickle(path), path)
        case suffix:
            raise UserError(
                f"{path.name} is no checkpoint that is understood: its suffix is {suffix or 'missing'}",
                fix="save the weights as .safetensors, or as .pt with torch.save(model.state_dict(), FILE)",
            )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with reading(path):
        path.open("rb").close()  # safetensors words a missing permission in its own way
        try:
            found = load_file(path)
        except SafetensorError as error:
            raise UserError(
                f"{path.name} is no whole .safetensors file: {error}", fix="copy or save it again"
            ) from error
    if not found:
        raise UserError(f"{path.name} holds no weights", fix="save them with save_file(model.state_dict(), FILE)")
    return found


def _read_pickle(path: Path) -> Any:
    with reading(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # where that matters, the error below says so
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        # what torch raises for a pickle that is not weights, or is broken
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError) as error:
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    refused = re.search(r"GLOBAL (\S+)", str(error))  # torch's word for a class or function that the file calls
    if refused:
        return UserError(
            f"{path.name} holds {refused[1]} beside weights: unpickling it could run code, so it was not read",
            fix="where you trust it, save its weights alone: torch.save(model.state_dict(), FILE)",
        )
    first_line = (str(error).splitlines() or [""])[0]
    if "weights_only" in first_line:  # torch advises to read it all the same, which could run code
        first_line = "it is not plain weights"
    return UserError(
        f"{path.name} is no whole checkpoint: {type(error).__name__}: {first_line}",
        fix="copy it again, or save it again with torch.save(model.state_dict(), FILE)",
    )


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict within the dictionaries that a training script put around it."""
    found = next(_state_dicts(loaded), None)
    if found is None:
        there = ", ".join(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise UserError(
            f"{path.name} holds no weights: {there}", fix="save them with torch.save(model.state_dict(), FILE)"
        )
    return found


def _state_dicts(value: Any) -> Iterator[dict[str, Tensor]]:
    """State dicts in the order in which they are preferred: wrapped weights, averaged ones, the mapping itself."""
    if not isinstance(value, Mapping):
        return
    for wrapper in (*WRAPPERS, *AVERAGES):
        yield from _state_dicts(value.get(wrapper))
    tensors = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
    if tensors:
        yield tensors


def _fill(model: nn.Module, weights: Mapping[str, Tensor], path: Path, spec: str) -> None:
    """Copy `weights` into `model`.  Raises UserError unless every name and shape fits."""
    own = model.state_dict(keep_vars=True)
    weights = _best_names(weights, own)
    _check_names(weights, own, path, spec)
    wrong = [name for name in weights if weights[name].shape != own[name].shape]
    if wrong:
        shapes = [f"{name} is {list(weights[name].shape)}, not {list(own[name].shape)}" for name in wrong[:SHOWN]]
        raise UserError(
            f"{len(wrong)} weights of {path.name} have another shape than in {spec}: {'; '.join(shapes)}",
            fix="build the network as it was trained (number of classes, widths): FILE.py:callable can pass them",
        )
    other = [name for name in weights if own[name].is_floating_point() and not weights[name].is_floating_point()]
    if other:
        raise UserError(
            f"{other[0]} of {path.name} holds {weights[other[0]].dtype}, not floats",
            fix="is it a checkpoint of a network that was quantised? this one begins with floats",
        )
    model.load_state_dict(dict(weights), strict=False)  # names are checked above, with better words


def _best_names(weights: Mapping[str, Tensor], own: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """`weights` with the prefixes off that make more of its names match the model's, and no others."""
    best = weights
    for renamed in _without_prefixes(weights):
        if len(renamed.keys() & own.keys()) > len(best.keys() & own.keys()):
            best = renamed
    return best


def _without_prefixes(weights: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    if any("_orig_mod." in name for name in weights):  # a compiled submodule has it in the middle of the name
        weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}
        yield weights
    prefix = _shared_prefix(weights)
    while prefix is not None:
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        yield weights
        prefix = _shared_prefix(weights)


def _shared_prefix(weights: Mapping[str, Tensor]) -> str | None:
    return next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in weights)), None)


def _check_names(weights: Mapping[str, Tensor], own: Mapping[str, Any], path: Path, spec: str) -> None:
    missing = [name for name in own if name not in weights and not _dispensable(name, weights, own)]
    unexpected = [name for name in weights if name not in own]
    if not missing and not unexpected:
        return
    if len(weights.keys() & own.keys()) < PLAUSIBLE * len(own):
        raise UserError(
            f"{path.name} is a checkpoint of another network: its names are like {_some(list(weights))}, "
            f"those of {spec} like {_some(list(own))}",
            fix="name the model that the checkpoint was saved from",
        )
    said = [f"has no weights for {_some(missing)}"] if missing else []
    said += [f"has weights that the model lacks: {_some(unexpected)}"] if unexpected else []
    raise UserError(f"{path.name} {' and '.join(said)}", fix=f"is it a checkpoint of exactly this {spec}?")


def _dispensable(name: str, weights: Mapping[str, Tensor], own: Mapping[str, Any]) -> bool:
    """A name that may be missing: a tied weight present under its other name, or BatchNorm's count of batches.

    That count is used only while training without momentum, and files older than it lack it.
    """
    tied = any(other in weights for other, tensor in own.items() if tensor is own[name])
    return tied or name.rpartition(".")[2] == "num_batches_tracked"


def _some(names: list[str] | set[str]) -> str:
    listed = sorted(names) if isinstance(names, set) else list(names)
    rest = len(listed) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _check_finite(model: nn.Module, where: str) -> None:
    """Raises UserError for NaN or infinity.  A buffer may hold minus infinity: attention masks do."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    broken = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not _sound(tensor, name in parameters)
    ]
    if broken:
        raise UserError(
            f"{where} has NaN or infinity in {_some(broken)}",
            fix="the training diverged; use an earlier checkpoint",
        )


def _sound(tensor: Tensor, is_parameter: bool) -> bool:
    finite = torch.isfinite(tensor)
    return bool((finite if is_parameter else finite | torch.isneginf(tensor)).all())
