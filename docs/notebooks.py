"""Three of the pages as notebooks, from the same Markdown: `python docs/notebooks.py`."""

import pathlib
import re
import tomllib
from typing import Any

import jupytext
import nbformat

HERE = pathlib.Path(__file__).parent
FOLDER = HERE / "notebooks"
PAGES = ("start", "language_models", "analysis")
EXTRAS = "plots"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    return tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]


def repository() -> str | None:
    """The repository's address, if pyproject.toml names one under `urls`."""
    return project().get("urls", {}).get("Repository")


def installation() -> str:
    """The first cell: from the repository, or from the copy of it that the notebook is in."""
    url = repository()
    source = f"../..[{EXTRAS}]" if url is None else f"{project()['name']}[{EXTRAS}] @ git+{url}"
    return f'%pip install --quiet "{source}"'


def convert(page: str) -> str:
    """The notebook of a page, as JSON."""
    text = (HERE / f"{page}.md").read_text()
    text = re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", text)  # other pages are not there
    notebook = jupytext.reads(text, fmt="md")
    notebook.cells.insert(0, nbformat.v4.new_code_cell(installation()))
    for i, cell in enumerate(notebook.cells):
        cell.id = f"{page}-{i}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    nbformat.validate(notebook)
    return nbformat.writes(notebook, indent=1) + "\n"


def offer(app: Any, page: str, source: list[str]) -> None:
    """Puts a link to the notebook below the heading of a page; Sphinx calls it for every page."""
    if page not in PAGES:
        return
    url = repository()
    link = f"[This page as a notebook](notebooks/{page}.ipynb), for Jupyter or Colab."
    if url is not None:
        path = url.removeprefix("https://github.com/").removesuffix(".git")
        target = f"https://colab.research.google.com/github/{path}/blob/main/docs/notebooks"
        link = f"[![Open in Colab]({BADGE})]({target}/{page}.ipynb)\n\n{link}"
    heading, text = source[0].split("\n", 1)
    source[0] = f"{heading}\n\n{link}\n{text}"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in PAGES:
        (FOLDER / f"{name}.ipynb").write_text(convert(name))
