"""The order of the modules, read from their imports, and what loading them costs."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTER = ("exporters", "kernels", "profiles")

LAYERS = (
    ("", "copying", "errors", "_modelopt_worker"),
    ("config", "cpu"),
    ("_outer", "rundir"),
    ("policy", "budget"),
    ("kernels",),
    ("sources",),
    ("batches",),
    ("graph", "profiles", "task", "usercode"),
    ("augment", "checkpoint", "imagefolder", "layout"),
    ("datasets",),
    ("cost", "compress"),
    ("exporters",),
    ("verify", "search"),
    ("alternatives", "calibration", "choices", "identity", "pricing"),
    ("pool", "subject", "trainer"),
    ("scoring",),
    ("files",),
    ("latencies",),
    ("report", "workbench", "demo", "plots"),
    ("console", "effects", "modelopt", "tensorboard"),
    ("offers",),
    ("costing",),
    ("posing",),
    ("choosing", "verification"),
    ("opening",),
    ("pipeline", "tables"),
    ("compare",),
    ("options",),
    ("cli",),
    ("__main__",),
)
"""Lowest first, by the first name below `hirelc_deploy`; the empty one is the package itself."""
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}

HEAVY = (
    *("torch", "onnx", "onnxruntime", "onnxscript", "transformers", "matplotlib", "PIL", "sklearn", "torch_pruning"),
    *("stable_baselines3", "gymnasium", "pymoo"),
)

SAYS_WHAT_IS_LOADED = f"""
import json, sys
print("loaded", json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""


def modules() -> dict[str, Path]:
    """Every module of ours, by the name that it is installed under."""
    named = {}
    for folder in ("hirelc_deploy", *OUTER):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            inner = parts[1:] if folder == "hirelc_deploy" else parts
            named[".".join(("hirelc_deploy", *inner)).removesuffix(".__init__")] = path
    return named


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports anywhere in it, in functions and for type checking as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def installed() -> set[str]:
    """Names of the installed distributions; a folder of ours that lies on the path is none."""
    return {distribution.name for distribution in distributions()}


def unit(module: str) -> str:
    """graph of hirelc_deploy.graph.trace.layers"""
    return module.split(".")[1] if "." in module else ""


def run(code: str, *, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new Python in `folder`, which is the first entry of its path."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_module_imports_only_from_lower_layers_and_its_own_folder():
    known = modules()
    wrong = []
    for module, path in known.items():
        for name in imports(path):
            if name.split(".")[0] != "hirelc_deploy":
                continue
            # `from hirelc_deploy import pipeline` imports a module, `from hirelc_deploy import __version__` does not
            target = name if name in known else name.rpartition(".")[0]
            if unit(target) != unit(module) and RANK[unit(target)] >= RANK[unit(module)]:
                wrong.append(f"{module} imports {target}")
    assert wrong == []


def test_every_module_has_a_layer():
    assert {unit(module) for module in modules()} - RANK.keys() == set()


def test_the_outer_folders_are_imported_under_their_installed_names():
    wrong = [f"{path}: {name}" for path in modules().values() for name in imports(path) if name.split(".")[0] in OUTER]
    assert wrong == []


@pytest.mark.parametrize("package", ["torch_pruning", "onnxruntime"])
def test_what_may_change_under_us_is_imported_in_one_file(package):
    assert len(importers(package)) == 1


@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_rtx"])
def test_an_optional_runtime_is_imported_in_one_file_at_most(package):
    assert len(importers(package)) <= 1


def importers(package: str) -> list[str]:
    """The modules of ours that import a package, without the one that is only shipped to devices and runs there."""
    here = {module: path for module, path in modules().items() if module != "hirelc_deploy.verify._runner"}
    return [module for module, path in here.items() if package in {name.split(".")[0] for name in imports(path)}]


@pytest.mark.parametrize(
    "code",
    [
        "import hirelc_deploy",
        "import hirelc_deploy.errors, hirelc_deploy.config, hirelc_deploy.policy, hirelc_deploy.budget",
        "import hirelc_deploy.profiles as p; p.load_target('host')",
        "from hirelc_deploy.cli import main; assert main(['--help']) == 0",
        "from hirelc_deploy.cli import main; assert main(['export', '--help']) == 0",
        "from hirelc_deploy.cli import main; assert main(['targets']) == 0",
    ],
)
def test_light_commands_load_nothing_heavy(code):
    done = run(code + SAYS_WHAT_IS_LOADED)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.rpartition("loaded")[2]) == []


def test_in_the_root_a_bare_name_loads_nothing_of_ours():
    done = run(
        f"""
import importlib, importlib.util, sys
for name in {OUTER!r}:
    bare = importlib.import_module(name)
    assert not hasattr(bare, "__path__") and importlib.util.find_spec(name) is not None, name
try:
    import kernels.int
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("kernels.int is a second copy of a format")
import hirelc_deploy.kernels.int, hirelc_deploy.exporters, hirelc_deploy.profiles
twice = [
    name for name, module in sys.modules.items()
    if (getattr(module, "__file__", None) or "").startswith({str(ROOT)!r} + "/") and name.split(".")[0] in {OUTER!r}
]
assert not twice, twice
"""
    )
    assert done.returncode == 0, done.stderr


def test_in_the_root_a_bare_name_finds_the_package_that_is_installed_under_it(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '99.1'\nfrom kernels.layer import Mode\n")
    (package / "layer.py").write_text("class Mode: pass\n")
    done = run(
        "import kernels, kernels.layer; assert kernels.__version__ == '99.1'\n"
        "assert kernels.Mode is kernels.layer.Mode\n"
        "import hirelc_deploy.kernels as ours; assert 'int' in ours.format_names()",
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif("kernels" in installed(), reason="the real package kernels is installed")
def test_transformers_works_in_the_root():
    done = run(
        "import transformers, transformers.modeling_utils, transformers.integrations.hub_kernels as hub\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert not is_kernels_available()\n"
        "config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, "
        "intermediate_size=8, image_size=8, patch_size=4)\n"
        "transformers.ViTForImageClassification(config)\n"
    )
    assert done.returncode == 0, done.stderr
