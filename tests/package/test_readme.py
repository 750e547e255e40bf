"""The Python examples of the README run, top to bottom, as one program."""

import re

import pytest
from support import ROOT
from support.pages import blocks_of

import keras_ssattn

README = (ROOT / "README.md").read_text()


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks, globs = blocks_of(README), {"__name__": "__readme__"}
    assert blocks
    for block in blocks:
        assert block.needs == ""
        block.run(globs)


def test_links_to_files_are_not_broken():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_error_that_a_page_shows_is_the_real_one():
    page = (ROOT / "docs" / "start.md").read_text()
    [shown] = re.findall(r"^ValueError: (.*)$", page, flags=re.MULTILINE)
    with pytest.raises(ValueError, match=re.escape(shown)):
        keras_ssattn.build(embed_dim=8, hidden_size=50)
