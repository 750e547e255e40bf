"""The public face: names, imports, docstrings that run, sizes of files."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys
import types

import pytest
from support.docstrings import failing_examples

import keras_ssattn

ROOT = pathlib.Path(keras_ssattn.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ONLY_ON_JAX = pytest.mark.backend("jax", reason="keras.distribution is for JAX")
MODULES = [
    pytest.param(name, marks=ONLY_ON_JAX if name == "keras_ssattn.distribution" else ())
    for name in (
        "keras_ssattn",
        *(m.name for m in pkgutil.walk_packages(keras_ssattn.__path__, "keras_ssattn.")),
    )
]
PUBLIC = [importlib.import_module(f"keras_ssattn{name}") for name in
          ("", ".ops", ".layers", ".models", ".analysis", ".ssmax", ".softpick")]  # fmt: skip
# What a part of the package may import: itself, and parts of a lower level.
LEVELS = {
    "_typing": 0, "_frameworks": 1, "_tensors": 2, "_checks": 3, "_keras": 4, "ops": 5, "layers": 6,
    "conversion": 7, "checkpoints": 7, "models": 8, "analysis": 9, "ssmax": 9, "softpick": 9,
    "distribution": 9, "__init__": 10,
}  # fmt: skip
KNOWS_FRAMEWORKS = ROOT / "_frameworks.py"


@pytest.mark.parametrize("module", PUBLIC, ids=lambda m: m.__name__)
def test_all_is_what_is_public(module):
    found = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__.startswith("keras_ssattn")
        and name != "build_attention"  # shared by the two mirrors, of no use beside them
    }
    modules = {n for n in module.__all__ if inspect.ismodule(getattr(module, n))}
    assert set(module.__all__) == found | modules
    assert len(module.__all__) == len(set(module.__all__))


@pytest.mark.parametrize("module", PUBLIC, ids=lambda m: m.__name__)
def test_everything_public_is_documented_with_an_example(module):
    for name in module.__all__:
        value = getattr(module, name)
        if not inspect.ismodule(value):
            assert ">>> " in inspect.getdoc(value), name


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    if name == "keras_ssattn.analysis.plots":
        pytest.importorskip("matplotlib", reason="plots need the extra of that name")
    assert failing_examples(importlib.import_module(name)) == []


WRONG_COMMENTS = ["1 / 3  # 0.34", "1 / 3  # [0.33]", "[1, 2]  # [1, 3]", "1 < 2  # False"]
RIGHT_COMMENTS = ["1 / 3  # 0.333", "[1 / 2]  # [0.5]", "1 < 2  # True", "2 / 3  # two of 3"]


@pytest.mark.parametrize(
    ("example", "fails"),
    [*((x, True) for x in WRONG_COMMENTS), *((x, False) for x in RIGHT_COMMENTS)],
)
def test_values_in_comments_behind_examples_are_compared(example, fails):
    module = types.ModuleType("module", f">>> {example}\n")
    assert bool(failing_examples(module)) == fails


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module in ("keras_ssattn", "keras"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    """Public Keras only, no framework but in one file, and one direction inside the package."""
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in _imports(path):
        top, *parts = name.split(".")
        assert top not in ("tensorflow", "jax", "torch") or path == KNOWS_FRAMEWORKS, name
        assert not name.startswith("keras.src"), name
        if top == "keras_ssattn" and parts and parts[0] in LEVELS and parts[0] != part:
            assert LEVELS[parts[0]] < LEVELS[part], f"{path} imports {name}"
            assert not any(x.startswith("_") for x in parts[1:]), f"{name} is private"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_and_no_function_is_long(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 480
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has {lines} lines"


def test_few_annotations_are_any():
    found = [
        ast.unparse(annotation)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for annotation in (*(x.annotation for x in node.args.args + node.args.kwonlyargs),
                           node.returns)
        if annotation is not None
    ]  # fmt: skip
    assert found.count("Any") < 0.15 * len(found)


def test_importing_the_package_imports_no_framework_of_another_backend(backend):
    others = {"tensorflow", "jax", "torch"} - {backend}
    code = (
        "import sys, keras; before = set(sys.modules); import keras_ssattn; "
        "print(sorted(m for m in set(sys.modules) - before if '.' not in m))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = set(ast.literal_eval(out.stdout.strip().splitlines()[-1]))
    assert "keras_ssattn" in new
    assert not new & others


def test_version():
    assert keras_ssattn.__version__.count(".") == 2
