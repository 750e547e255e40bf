"""The Python examples of the README run, top to bottom, as one program."""

import os
import re
import subprocess
import sys

from support import ROOT

README = (ROOT / "README.md").read_text()


def test_examples_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 5
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_links_to_files_are_not_broken():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_error_in_the_readme_is_the_real_one():
    import pytest

    import keras_ssattn

    [shown] = re.findall(r"^ValueError: (.*)$", README, flags=re.MULTILINE)
    with pytest.raises(ValueError, match=re.escape(shown)):
        keras_ssattn.build(embed_dim=8, hidden_size=50)
