"""Code in Markdown: the blocks of a page, and what runs them, in order and in one namespace."""

import ast
import doctest
import importlib.util
import os
import re
import subprocess
import sys
from typing import NamedTuple

import keras

from support import ROOT
from support.docstrings import run_statement

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r"# needs: (.*)\n")

DEVICES = "4 devices of JAX"
ONNX = {"tensorflow": ("tf2onnx",), "jax": ("jax2onnx",), "torch": ("onnxscript",)}


class Block(NamedTuple):
    """A block of code, and what it needs beyond the package; "" for nothing."""

    language: str
    code: str
    needs: str

    def run(self, globs: dict) -> None:
        if self.language == "pycon":
            test = doctest.DocTestParser().get_doctest(self.code, globs, "page", None, 0)
            result = doctest.DocTestRunner(verbose=False).run(test, clear_globs=False)
            assert result.failed == 0
            return
        for statement in statements(self.code):
            run_statement(statement, globs)


def run_on_devices(blocks: list[Block]) -> None:
    """Runs blocks in a process of its own, in which JAX makes four devices of a CPU."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(x.code for x in blocks)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def blocks_of(text: str) -> list[Block]:
    found = []
    for language, code in BLOCK.findall(text):
        needs = NEEDS.match(code)
        found.append(Block(language, code, needs[1] if needs else ""))
    return found


def statements(code: str) -> list[str]:
    """The top-level statements of a program, each with the comment behind it."""
    lines = code.splitlines()
    return ["\n".join(lines[x.lineno - 1 : x.end_lineno]) for x in ast.parse(code).body]


def is_there(needs: str) -> bool:
    """Whether the environment has what a block needs."""
    backend = keras.backend.backend()
    if needs == DEVICES:
        return backend == "jax"
    names = {"ONNX": ONNX[backend], "matplotlib": ("matplotlib",)}[needs]
    return all(importlib.util.find_spec(name) for name in names)
