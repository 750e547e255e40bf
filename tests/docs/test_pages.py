"""The code of the documentation runs, page by page."""

import re

import pytest
from support.exports import MARKS
from support.pages import DEVICES, DOCS, PAGES, blocks_of, is_there, run_on_devices

BLOCKS = {page.stem: blocks_of(page.read_text()) for page in PAGES}
WITH_CODE = [name for name, blocks in BLOCKS.items() if any(not x.needs for x in blocks)]
# All that a test may leave out, where the environment lacks it.
NEEDED = {
    "analysis": ["matplotlib"],
    "devices": [DEVICES, DEVICES],
    "exports": ["ONNX", "ONNX"],
    "start": ["ONNX"],
}

pytestmark = [
    # of Keras, which its users see as well
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning"),
    *MARKS,  # of exporters
]


def run(name, needs, folder, monkeypatch):
    monkeypatch.chdir(folder)
    globs = {"__name__": "__page__"}
    blocks = [x for x in BLOCKS[name] if x.needs in ("", needs)]
    if needs == DEVICES:
        run_on_devices(blocks)
    else:
        for block in blocks:
            block.run(globs)


@pytest.mark.parametrize("name", WITH_CODE)
def test_code_runs(name, tmp_path, monkeypatch):
    run(name, "", tmp_path, monkeypatch)


@pytest.mark.parametrize("name", NEEDED)
def test_code_that_needs_more_runs(name, tmp_path, monkeypatch):
    [needs] = {*NEEDED[name]}
    if not is_there(needs):
        pytest.skip(f"{len(NEEDED[name])} blocks of {name}.md need {needs}")
    run(name, needs, tmp_path, monkeypatch)


def test_no_other_code_is_left_out():
    found = {name: [x.needs for x in blocks if x.needs] for name, blocks in BLOCKS.items()}
    assert {name: needs for name, needs in found.items() if needs} == NEEDED


def test_every_block_of_python_is_found():
    """However it is fenced or indented."""
    for page in PAGES:
        fences = re.findall(r"^[ \t]*(?:```+|~~~+)\{?(\w*)", page.read_text(), re.M)
        python = [x for x in fences if x.startswith(("py", "code"))]
        assert len(python) == len(BLOCKS[page.stem]), page


def test_links_to_files_are_not_broken():
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and "_generated" not in str(page):
                assert (page.parent / target).exists(), (page, target)
