"""The notebooks are what the Markdown gives."""

import json

import pytest
from support.pages import DOCS, blocks_of

pytest.importorskip("jupytext", reason="notebooks are made by it")

import notebooks


@pytest.mark.parametrize("page", notebooks.PAGES)
def test_a_notebook_is_that_of_its_page(page):
    """If not: python docs/notebooks.py."""
    assert notebooks.convert(page) == (notebooks.FOLDER / f"{page}.ipynb").read_text()


@pytest.mark.parametrize("page", notebooks.PAGES)
def test_a_notebook_installs_the_package_and_has_all_code(page):
    cells = json.loads(notebooks.convert(page))["cells"]
    first, *code = ("".join(x["source"]) for x in cells if x["cell_type"] == "code")
    assert first.startswith("%pip install")
    assert code == [x.code.strip() for x in blocks_of((DOCS / f"{page}.md").read_text())]
    assert not any("](" in x and ".md" in x for x in code)


def test_no_other_notebook_is_there():
    assert {x.stem for x in notebooks.FOLDER.iterdir()} == set(notebooks.PAGES)


@pytest.mark.parametrize("url", [None, "https://github.com/owner/name"])
def test_where_a_notebook_comes_from(url, monkeypatch):
    """From the repository that pyproject.toml names, or from the copy that the notebook is in."""
    monkeypatch.setattr(notebooks, "repository", lambda: url)
    source = ["# Start\n\nText.\n"]
    notebooks.offer(None, "start", source)
    if url is None:
        assert notebooks.installation() == '%pip install --quiet "../..[plots]"'
        assert "colab.research" not in source[0]
    else:
        assert f"keras-ssattn[plots] @ git+{url}" in notebooks.installation()
        target = "owner/name/blob/main/docs/notebooks/start.ipynb"
        assert f"(https://colab.research.google.com/github/{target})" in source[0]
    assert source[0].startswith("# Start\n\n[")
    assert source[0].endswith("\n\nText.\n")
