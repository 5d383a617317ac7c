"""The order of the packages, and what `import batchjac` may not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "batchjac"

# Each package imports only from packages before it. "__init__" is the public face: whatever
# comes after it is a user of batchjac, whatever comes before it is batchjac itself.
ORDER = (
    "errors",
    "tree",
    "descend",
    "state",
    "outside",
    "aside",
    "plain",
    "pooling",
    "problem",
    "stand_in",
    "graph",
    "capture",
    "locate",
    "memory",
    "block",
    "samples",
    "factors",
    "space",
    "seeds",
    "sink",
    "solution",
    "answer",
    "calibration",
    "ordinary",
    "product",
    "native",
    "opaque",
    "kernels",
    "convolutions",
    "speed",
    "rules",
    "cost",
    "cuts",
    "route",
    "plan",
    "engines",
    "independence",
    "choose",
    "pace",
    "job",
    "work",
    "history",
    "chosen",
    "verify",
    "coupling",
    "solve",
    "again",
    "recompute",
    "planning",
    "api",
    "pulling",
    "unchanged",
    "recording",
    "selected",
    "gram",
    "measures",
    "exports",
    "maps",
    "lazy",
    "linalg",
    "dataset",
    "attribution",
    "report",
    "__init__",
    "testing",
    "factory",
    "doctor",
    "demo",
    "cli",
)

HEAVY = ("matplotlib", "zarr", "ray", "typer", "sklearn", "tqdm", "jinja2", "scipy", "captum")


def module_name(path: Path, root: Path) -> str:
    """The dotted name under the package: "rules.linear", "rules.__init__", "errors"."""
    return ".".join(path.relative_to(root).with_suffix("").parts)


def modules(root: Path) -> dict[str, ast.Module]:
    return {module_name(path, root): ast.parse(path.read_text()) for path in root.rglob("*.py")}


def imported(name: str, tree: ast.Module, known: frozenset[str]) -> set[str]:
    """The package's own modules that `name` imports anywhere, in functions and for typing too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.split(".")[0] == "batchjac")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = ["batchjac", *name.split(".")][: -node.level]
                base = ".".join([*parents, *([base] if base else [])])
            if base.split(".")[0] == "batchjac":
                found.update(f"{base}.{a.name}" for a in node.names)
    return {resolve(dotted, known) for dotted in found} - {name}


def resolve(dotted: str, known: frozenset[str]) -> str:
    """From "batchjac.rules.linear.rule" to "rules.linear": the longest part that is a module."""
    parts = dotted.split(".")[1:]
    for end in range(len(parts), -1, -1):
        for candidate in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if candidate in known:
                return candidate
    raise LookupError(dotted)


def import_edges(root: Path) -> dict[str, set[str]]:
    trees = modules(root)
    known = frozenset(trees)
    return {name: imported(name, tree, known) for name, tree in trees.items()}


def violations(edges: dict[str, set[str]]) -> list[str]:
    """Imports that point downwards in ORDER, one sentence each."""
    rank = {package: position for position, package in enumerate(ORDER)}
    return [
        f"{name} imports {target}, which comes later"
        for name, targets in sorted(edges.items())
        for target in sorted(targets)
        if rank[target.split(".")[0]] > rank[name.split(".")[0]]
    ]


def test_every_package_has_a_place_in_the_order():
    packages = {name.split(".")[0] for name in modules(SRC)}
    assert packages, f"no module under {SRC}"
    assert packages <= set(ORDER), "give the new package its place in ORDER"


def test_each_package_imports_only_from_those_above_it():
    assert violations(import_edges(SRC)) == []


def test_no_two_modules_import_each_other():
    TopologicalSorter(import_edges(SRC)).prepare()  # raises CycleError, naming the cycle


@pytest.mark.parametrize(
    "statement",
    [
        "from batchjac.engines import sweep",
        "from batchjac.engines.sweep import jacobian",
        "import batchjac.engines.sweep",
        "from ..engines import sweep",
        "from ..engines.sweep import jacobian",
        "def late():\n    from batchjac.engines import sweep",
    ],
)
def test_an_import_downwards_is_found(tmp_path: Path, statement: str):
    for path in ("rules/__init__.py", "engines/__init__.py", "engines/sweep.py", "__init__.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "rules" / "linear.py").write_text(statement)
    assert violations(import_edges(tmp_path)) == [
        "rules.linear imports engines.sweep, which comes later"
    ]


def test_importing_batchjac_loads_nothing_that_is_only_an_extra():
    # torch itself picks up tqdm where it finds it; what counts is what we add.
    script = f"""
import sys, torch
before = set(sys.modules)
import batchjac
print(*sorted({set(HEAVY)!r} & sys.modules.keys() - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_a_first_call_loads_no_compiler_and_no_symbolic_algebra():
    """A third of a second and 34 MiB, which torch takes when autograd.grad is given a cotangent.

    The compilers take more; ``compile=True`` loads them.
    """
    script = """
import sys, torch, batchjac
heavy = {"sympy", "torch._dynamo", "torch._inductor.compile_fx"}
assert not heavy & sys.modules.keys()
batchjac.jacobian(torch.nn.Linear(3, 2), torch.randn(4, 3))
print(bool(heavy & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]


def test_the_core_works_with_torch_alone():
    script = f"""
import sys
sys.modules.update(dict.fromkeys({sorted({*HEAVY, "numpy", "safetensors"})!r}))  # not importable
from batchjac import doctor
sys.exit(doctor.run())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "models agree" in done.stdout
