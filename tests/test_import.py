"""What importing rope_fused may do, and which module may import which."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The import law: a module may import those of a later row. A package counts with all that is
# inside it, and its own modules may import each other. `rope_fused` is the list of public names.
# Every module in no row is a leaf (specs, scaling, configurations, phase): any row may import it,
# and it imports only other leaves.
LAW = [
    {"__main__"},
    {"cli"},
    {"rope_fused"},
    {"compat"},
    {"context", "integrations", "report"},
    {"modules"},
    {"api"},
    {"distributed"},
    {"operands"},
    {"ops"},
    {"dispatch"},
    {"native", "triton_backend", "cuda_backend"},
    {"triton_kernels", "_cpu", "_cuda", "reference"},
]
RANK = {name: row for row, names in enumerate(LAW) for name in names}

# Loaded by dispatch, inside a function, when a call needs them.
USES_TRITON = {"triton_backend", "triton_kernels"}

# Other packages: the upper rows may import any, leaves and the others these.
ALWAYS = {"torch", "numpy", *sys.stdlib_module_names}
FREE = {"cli", "__main__", "compat", "context", "integrations", "report"}
NEVER = {"tests", "bench", "helpers", "conftest", "triton_kernels"}


def modules_in(root):
    """{module name: file} of rope_fused under `root`, its Triton kernels included."""
    found = {}
    for name in ("rope_fused", "rope_fused.triton_kernels"):
        folder = name.split(".")[-1]
        for file in (root / folder).rglob("*.py"):
            parts = [name, *file.relative_to(root / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports_of(module, file, modules):
    """(name, line, lazy) of each import in `file`; lazy ones happen inside a function."""
    tree = ast.parse(file.read_text(), str(file))
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    known = {*modules, "rope_fused._cpu", "rope_fused._cuda"}

    def absolute(name):
        level = len(name) - len(name.lstrip("."))
        parent = package.split(".")[: len(package.split(".")) + 1 - level] if level else []
        return ".".join([*parent, name[level:]]).strip(".")

    def visit(node, lazy):
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute("." * node.level + (node.module or ""))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in known else base, node.lineno, lazy
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            first = node.args[0] if node.args else None
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield absolute(first.value), node.lineno, lazy
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return list(visit(tree, False))


def place(module):
    """The name in the law that covers `module`: the first one below the root."""
    return module.split(".")[min(1, module.count("."))]


def objection(own, name, lazy):
    """Why the law forbids the module at place `own` to import `name`, or None."""
    top = name.split(".")[0]
    if top == "rope_fused":
        target = place(name)
        if target != own and RANK.get(target, len(LAW) + 1) <= RANK.get(own, len(LAW)):
            return f"is not below {own}"
        if target in USES_TRITON and own not in USES_TRITON and not lazy:
            return "is imported only inside functions"
    elif top in NEVER:
        return "is never imported by the package"
    elif top == "triton":
        if own not in USES_TRITON:
            return "is imported only by the kernels and triton_backend"
    elif own not in FREE and top not in ALWAYS:
        return "is more than torch, numpy and the standard library"
    return None


def breaches(root):
    """Every import under `root` that the law forbids, as 'file:line: name why'."""
    modules = modules_in(root)
    found = []
    for module, file in sorted(modules.items()):
        own, where = place(module), file.relative_to(root)
        for name, line, lazy in imports_of(module, file, modules):
            if why := objection(own, name, lazy):
                found.append(f"{where}:{line}: {name} {why}")
    return found


def test_import_law():
    assert len(modules_in(ROOT)) > 1, f"found no modules under {ROOT}"
    assert breaches(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("rope_fused/spec.py", "import scipy", "scipy is more than torch"),
        ("rope_fused/spec.py", "def f():\n    import transformers", "transformers is more than"),
        ("rope_fused/configs.py", "from .ops import rotate", "rope_fused.ops is not below configs"),
        ("rope_fused/ops.py", "from . import api", "rope_fused.api is not below ops"),
        ("rope_fused/ops.py", "from . import __version__", "rope_fused is not below ops"),
        ("rope_fused/dispatch.py", "import rope_fused.ops as o", "rope_fused.ops is not below"),
        ("rope_fused/dispatch.py", "import triton", "triton is imported only by the kernels"),
        ("rope_fused/dispatch.py", "def f():\n    import triton", "triton is imported only by"),
        ("rope_fused/dispatch.py", "from . import triton_kernels", "imported only inside"),
        ("rope_fused/dispatch.py", "from . import triton_backend", "imported only inside"),
        ("rope_fused/dispatch.py", "def f():\n    from . import triton_backend", None),
        ("rope_fused/triton_backend.py", "import triton\nfrom .triton_kernels import g", None),
        ("rope_fused/triton_backend.py", "from . import dispatch", "is not below triton_backend"),
        ("rope_fused/api.py", "def f():\n    import triton", "triton is imported only by"),
        ("rope_fused/__main__.py", "from .cli import main", None),
        ("rope_fused/reference.py", "def f():\n    from .ops import g", "is not below reference"),
        ("rope_fused/reference.py", "from importlib import import_module as i", None),
        ("rope_fused/context/search.py", "from .. import integrations", "is not below context"),
        ("rope_fused/context/search.py", "from ..cli import main", "rope_fused.cli is not below"),
        ("rope_fused/context/search.py", "from .needle import score\nfrom ..api import f", None),
        ("rope_fused/modules.py", "import importlib\nimportlib.import_module('.cli')", "not below"),
        ("rope_fused/modules.py", "__import__('tests.helpers')", "tests.helpers is never imported"),
        ("rope_fused/modules.py", "from bench import timing", "bench is never imported"),
        ("rope_fused/report.py", "import triton_kernels", "triton_kernels is never imported"),
        ("rope_fused/surprise.py", "from .ops import f", "rope_fused.ops is not below surprise"),
        ("rope_fused/surprise.py", "import torch\nfrom .spec import S\nfrom . import spec", None),
        ("rope_fused/dispatch.py", "def f():\n    from . import _cpu", None),
        ("triton_kernels/rotate.py", "import triton\nfrom . import phase", None),
        ("triton_kernels/rotate.py", "from .. import dispatch", "is not below triton_kernels"),
        ("rope_fused/__init__.py", "from .api import apply_rope\nfrom .spec import S", None),
        ("rope_fused/__init__.py", "from .cli import main", "rope_fused.cli is not below"),
    ],
)
def test_the_law_sees(tmp_path, file, source, complaint):
    """The test above can fail: each breach is found where it stands, and what is legal passes."""
    for name in ("ops", "api", "cli", "integrations/__init__", "reference", "spec", "dispatch",
                 "triton_backend"):  # fmt: skip
        path = tmp_path / "rope_fused" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels/__init__.py").touch()
    (tmp_path / "rope_fused/__init__.py").touch()
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(source + "\n")
    found = breaches(tmp_path)
    assert len(found) == (complaint is not None), found
    assert complaint is None or (found[0].startswith(f"{file}:") and complaint in found[0])


# Runs in a fresh interpreter: imports torch, which may import what it likes, then watches.
WATCH = """
import json, sys
import torch

class Watch:
    asked = set()
    def find_spec(self, name, path=None, target=None):
        self.asked.add(name.partition(".")[0])

sys.meta_path.insert(0, Watch())
before = set(sys.modules)
import rope_fused
print(json.dumps({
    "new": sorted(set(sys.modules) - before),
    "asked": sorted(Watch.asked),
    "loaded": sorted({name.partition(".")[0] for name in sys.modules}),
    "file": rope_fused.__file__,
    "cuda": torch.cuda.is_initialized(),
}))
"""


def python(code, cwd, *options):
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_import_is_light(tmp_path):
    """import rope_fused loads no Triton, no transformers, and makes no CUDA context."""
    done = python(WATCH, tmp_path)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    heavy = {"triton", "transformers", "matplotlib", "tqdm", "pytest", "triton_kernels"}
    assert heavy & set(seen["asked"]) == set()
    assert {"triton", "transformers"} & set(seen["loaded"]) == set()
    assert seen["cuda"] is False
    others = [name for name in seen["new"] if name.partition(".")[0] != "rope_fused"]
    assert len(others) < 20 and len(seen["new"]) < 60, seen["new"]


# What the import costs beyond torch's, in seconds of this process, whatever else is running.
COST = """
import time, torch
start = time.process_time()
import rope_fused
print(time.process_time() - start)
"""


@pytest.mark.slow
def test_import_takes_little(tmp_path):
    """Less than 150 ms more than torch."""
    found = sorted(float(python(COST, tmp_path).stdout) for _ in range(5))
    assert found[2] < 0.15, found


def test_import_without_triton_and_transformers(tmp_path):
    """The same import works where neither is installed."""
    block = "import sys; sys.modules.update(triton=None, transformers=None); import rope_fused"
    done = python(block, tmp_path)
    assert done.returncode == 0, done.stderr


def test_top_level_triton_kernels_refuses():
    """The folder never stands in for Triton's own package triton_kernels."""
    done = python("import triton_kernels", ROOT)
    assert done.returncode != 0
    assert "ImportError: this folder is the package rope_fused.triton_kernels" in done.stderr


def test_triton_kernels_has_its_own_name(tmp_path):
    done = python("import rope_fused.triton_kernels as t; print(t.__name__)", tmp_path)
    assert done.stdout.strip() == "rope_fused.triton_kernels", done.stderr
