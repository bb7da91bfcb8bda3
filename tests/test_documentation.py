"""README and guides: links lead somewhere, code compiles and imports what exists, named files and tests exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_partial_embed

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("examples/**/*.md")), ROOT / "tests" / "README.md"]
LONGEST = 300

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


CODE = [
    pytest.param(code, id=f"{name_of(page)}-{number}")
    for page in PAGES
    for number, (language, code) in enumerate(BLOCK.findall(page.read_text("utf-8")))
    if language == "python"
]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_a_file_and_a_heading(page):
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                missing.append(link)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_tests_that_are_named_exist(page):
    missing, last = [], None
    for path, test in re.findall(r"((?:tests|examples)/[\w/]+\.py)?(?:::(test_\w+))?", page.read_text("utf-8")):
        last = ROOT / path if path else last
        if path and not last.is_file():
            missing.append(path)
        elif test and (last is None or f"def {test}" not in last.read_text("utf-8")):
            missing.append(f"{path}::{test}")
    assert not missing


@pytest.mark.parametrize("code", CODE)
def test_code_compiles_and_imports_what_the_package_has(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hf_partial_embed"):
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_code_for_plain_networks_runs():
    page = (ROOT / "examples" / "guides" / "training.md").read_text("utf-8")
    code = next(code for _, code in BLOCK.findall(page.partition("## Plain PyTorch")[2]))
    names = {"nn": nn, "torch": torch, "glove": torch.ones(5, 4)}
    exec(code, names)
    before = names["table"].weight.detach().clone()
    names["table"](torch.tensor([3, 4])).sum().backward()
    names["optimizer"].step()
    moved = (names["table"].weight != before).any(1).nonzero().flatten().tolist()
    assert moved == [3, 17]  # 17 by weight decay alone
    assert names["head"].new_rows.weight.shape == (3, 64)


def test_readme_is_short_and_says_what_each_wing_knows():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= LONGEST
    package = Path(hf_partial_embed.__file__).parent
    wings = {path.name for path in package.iterdir() if path.is_dir() and path.name[0] != "_"}
    table = text.partition("| wing |")[2].partition("\n\n")[0]
    assert wings == set(re.findall(r"^\| `(\w+)/`", table, re.MULTILINE))


def test_readme_has_one_command_for_the_tests_and_one_for_the_demo():
    for marker in ("test", "demo"):
        assert re.search(rf"<!-- {marker} -->\n```bash\n[^\n]+\n```\n", README.read_text("utf-8"))
