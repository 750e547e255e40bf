"""The examples import each other as scripts do, from their own folders."""

import pathlib
import sys

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "papers")]
