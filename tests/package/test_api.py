"""The public face: names, imports, docstrings that run, sizes of files."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import pytest
from support.docstrings import failing_examples

import keras_ssattn

ROOT = pathlib.Path(keras_ssattn.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = ["keras_ssattn", *(
    m.name for m in pkgutil.walk_packages(keras_ssattn.__path__, "keras_ssattn.")
)]  # fmt: skip
PUBLIC = [importlib.import_module(f"keras_ssattn{name}") for name in
          ("", ".ops", ".layers", ".models", ".analysis", ".ssmax", ".softpick")]  # fmt: skip
# What a part of the package may import: itself and what is below it.
ORDER = ["ops", "layers", "models", "analysis", "ssmax"]
KNOWS_FRAMEWORKS = ROOT / "models" / "compiled.py"


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
def test_examples_in_docstrings_run(name, backend):
    if name == "keras_ssattn.distribution" and backend != "jax":
        pytest.skip("keras.distribution is for JAX")
    if name == "keras_ssattn.analysis.plots":
        pytest.importorskip("matplotlib", reason="plots need the extra of that name")
    assert failing_examples(importlib.import_module(name)) == []


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
    level = ORDER.index({"softpick": "ssmax"}.get(part, part)) if part in (
        *ORDER, "softpick") else len(ORDER)  # fmt: skip
    for name in _imports(path):
        top = name.split(".")[0]
        assert top not in ("tensorflow", "jax", "torch") or path == KNOWS_FRAMEWORKS, name
        assert not name.startswith("keras.src"), name
        if top == "keras_ssattn" and "." in name:
            other = name.split(".")[1]
            if other in ORDER:
                assert ORDER.index(other) <= level, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 320


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
