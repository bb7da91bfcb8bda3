"""The layout of the package: each wing imports from wings below it, and nothing is a circle."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_partial_embed

PACKAGE = Path(hf_partial_embed.__file__).parent

# From the bottom up; wings of one floor do not know each other.
FLOORS = [
    {"errors", "lazy"},
    {"optional"},
    {"modules", "tokens"},
    {"layout", "files"},
    {"initializers"},
    {"attachment"},
    {"evaluation", "formats"},
    {"api", "training"},
    {"__init__"},
    {"cli"},
]
FLOOR = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}
LONGEST = 400
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it, below the package's name."""
    package = [*path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            base = [*start, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                name = ".".join([*base, alias.name])
                here = (PACKAGE / Path(*base, alias.name)).with_suffix(".py")
                found.add(name if here.is_file() or here.with_suffix("").is_dir() else ".".join(base) or "__init__")
    return found


def test_every_file_belongs_to_a_wing():
    assert {module_of(path).partition(".")[0] for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_wings_import_from_below(path):
    wing = module_of(path).partition(".")[0]
    above = {
        module
        for module in imports_of(path)
        if (other := module.partition(".")[0]) != wing and FLOOR[other] >= FLOOR[wing]
    }
    # One call goes up, by name: `partial.evaluate` (see `lazy.lazy_function`).
    assert not above


def test_no_file_imports_itself_by_way_of_others():
    graph = {module_of(path): imports_of(path) for path in FILES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in graph.get(module, ()):
                if other != module:
                    visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_long_file_says_why(path):
    lines = len(path.read_text("utf-8").splitlines())
    if lines > LONGEST:
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        assert "One file, since" in docstring, f"{lines} lines: part it, or say in its docstring: One file, since ..."


def loaded_after(code: str) -> set[str]:
    run = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", run], check=True, capture_output=True, text=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_no_wing_loads_anything_heavy_by_itself():
    wings = ["cli", "training", "evaluation", "formats", "attachment", "layout", "files", "tokens"]
    heavy = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "tqdm", "matplotlib"}
    assert not heavy & loaded_after("\n".join(f"import hf_partial_embed.{wing}" for wing in wings))


def test_plain_modules_know_no_transformers():
    names = [module_of(path) for path in FILES if module_of(path).startswith("modules")]
    assert not {"transformers", "tokenizers", "huggingface_hub"} & loaded_after(
        "\n".join(f"import hf_partial_embed.{name}" for name in names)
    )


def test_tokens_know_no_model():
    names = [module_of(path) for path in FILES if module_of(path).startswith("tokens")]
    assert not {"torch.nn", "transformers"} & loaded_after(
        "\n".join(f"import hf_partial_embed.{name}" for name in names)
    )
