"""The order of the layers, read off the imports; and that importing does nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each layer imports from itself and from those before it.
LAYERS = (
    ("errors", "config"),
    ("record",),
    ("search",),
    ("losses", "targets"),
    ("cache",),
    ("data",),
    ("models", "students", "adapters", "depths", "feature_tap", "masked_words", "next_token", "taught"),
    ("exports",),
    ("engine", "engine_base", "fused", "plain_engine"),
    ("report",),
    ("stages",),
    ("serving",),
    ("tickets", "demo", "stories", "demo_language"),
    ("terminal", "deploy_commands", "cli", "__main__"),
    ("jobs",),
)
# Who may import what: heavy packages, and those that tie code to one framework.
ONLY = {
    "deepspeed": {"engine"},
    "transformers": {"models", "students", "data", "demo", "demo_language"},
    "ray": {"stages", "serving", "jobs"},
    "fastapi": {"serving"},
    "prometheus_client": {"serving"},
    "peft": {"adapters"},
    "optuna": {"search"},
    "wandb": {"stages"},
    "mlflow": {"stages"},
    "onnx": {"exports"},
    "onnxruntime": {"exports"},
    "torchao": {"exports"},
    "gguf": {"exports"},
    "lm_eval": {"stages"},
}
MATHS = {"losses", "targets"}


def modules() -> dict[str, Path]:
    """Every module of the package and every job by its dotted name."""
    paths = [*(ROOT / "raydistill").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


MODULES = modules()


def layer_name(module: str) -> str:
    """`raydistill.data.order` is in `data`, `jobs.run` in `jobs`."""
    return module.removeprefix("raydistill.").partition(".")[0]


def imports(module: str) -> set[str]:
    """What a module imports, anywhere in it, as dotted names; of `from a import b` also `a.b` when that is a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= submodules or {node.module}
    return found


def packages(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(module)}


RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
CODE = sorted(module for module in MODULES if module != "raydistill")


def test_every_module_has_a_layer():
    assert {layer_name(module) for module in CODE} == set(RANKS)


@pytest.mark.parametrize("module", CODE)
def test_a_module_imports_from_its_layer_and_those_before_it(module: str):
    rank = RANKS[layer_name(module)]
    ours = {name for name in imports(module) if name.partition(".")[0] in ("raydistill", "jobs")}
    assert "raydistill" not in ours
    assert not {name for name in ours if RANKS[layer_name(name)] > rank}


@pytest.mark.parametrize("module", CODE)
def test_a_heavy_package_is_imported_where_it_belongs(module: str):
    wrong = {package for package, layers in ONLY.items() if layer_name(module) not in layers}
    assert not packages(module) & wrong


@pytest.mark.parametrize("module", [module for module in CODE if layer_name(module) in MATHS])
def test_the_maths_imports_torch_alone(module: str):
    assert packages(module) - set(sys.stdlib_module_names) <= {"torch", "raydistill"}
    assert {layer_name(name) for name in imports(module) if name.startswith("raydistill")} <= MATHS


@pytest.mark.parametrize("module", [module for module in CODE if layer_name(module) == "search"])
def test_a_search_decides_without_models(module: str):
    assert packages(module) - set(sys.stdlib_module_names) <= {"raydistill", "numpy", "optuna"}


@pytest.mark.parametrize("module", [module for module in CODE if layer_name(module) == "report"])
def test_the_report_is_made_of_facts_alone(module: str):
    assert {layer_name(name) for name in imports(module) if name.startswith("raydistill")} <= {"report"}


def test_init_files_hold_no_code():
    for path in [path for path in MODULES.values() if path.name == "__init__.py"]:
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        assert all(isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in statements), path


def fresh(program: str, folder: Path) -> str:
    """What a program prints in a new process that starts in this folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


IMPORT_ALL = f"""
import importlib, logging, os, runpy, sys, threading
environment = dict(os.environ)
for module in {[module for module in CODE if not module.endswith("__main__")]!r}:
    if module.startswith("jobs."):
        runpy.run_path(os.path.join({str(ROOT)!r}, *module.split(".")) + ".py", run_name="imported")
    else:
        importlib.import_module(module)
assert dict(os.environ) == environment, set(os.environ.items()) ^ set(environment.items())
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
assert not logging.getLogger().handlers
heavy = {{"ray", "transformers", "deepspeed", "optuna"}} & set(sys.modules)
assert not heavy, heavy
print("nothing was done")
"""


def test_importing_every_module_does_nothing(tmp_path: Path):
    assert fresh(IMPORT_ALL, tmp_path) == "nothing was done"
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_answers_before_heavy_packages_are_imported(tmp_path: Path):
    program = (
        "import sys, raydistill.cli; print(sorted({'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    assert fresh(program, tmp_path) == "[]"
