"""Imports point one way; see docs/architecture.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TYPES = {"vla.types", "vla.config"}
# Place -> what of this project it may import, besides itself. What is not listed may import everything.
ALLOWED = {
    "vla/types.py": set(),
    "vla/precision.py": set(),
    "vla/versions.py": {"vla.files", "vla.precision"},
    "vla/config.py": set(),
    "vla/files.py": {"vla.types"},
    "vla/config_io.py": {"vla.types", "vla.files"},
    "vla/locks.py": {"vla.types", "vla.files"},
    "vla/workers.py": set(),
    "vla/losses": set(),
    "vla/data": TYPES | {"vla.files"},
    "vla/models": TYPES | {"vla.losses"},
    "vla/policies": TYPES | {"vla.files", "vla.models", "vla.losses", "vla.precision"},
    "vla/eval": TYPES
    | {
        "vla.files",
        "vla.config_io",
        "vla.versions",
        "vla.locks",
        "vla.workers",
        "vla.data",
        "vla.models",
        "vla.losses",
        "vla.policies",
        "envs",
    },
    "vla/training": TYPES
    | {
        "vla.files",
        "vla.config_io",
        "vla.versions",
        "vla.precision",
        "vla.locks",
        "vla.data",
        "vla.models",
        "vla.losses",
        "vla.policies",
        "vla.eval",
    },
    "envs": set(),
    "scripts": {"vla.cli"},
}


def project_imports(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            modules.add(node.module)
    return {m for m in modules if m.split(".")[0] in ("vla", "envs", "scripts", "tests")}


@pytest.mark.parametrize("place", ALLOWED)
def test_a_place_imports_only_what_comes_before_it(place):
    path = ROOT / place
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    own = place.removesuffix(".py").replace("/", ".")
    for file in files:
        name = str(file.relative_to(ROOT))
        for module in project_imports(file):
            allowed = any(module == a or module.startswith(a + ".") for a in ALLOWED[place] | {own})
            assert allowed, f"{name} imports {module}"


def test_only_the_reader_of_data_sets_and_the_tools_that_compare_with_lerobot_import_its_data_sets():
    users = {
        str(file.relative_to(ROOT)) for file in (ROOT / "vla").rglob("*.py") if "lerobot.datasets" in file.read_text()
    }
    assert users <= {"vla/bench.py", "vla/integrations/dataset_writer.py"}


def test_transformers_models_are_built_in_one_place():
    users = {str(file.relative_to(ROOT)) for file in (ROOT / "vla").rglob("*.py") if "CLIPModel(" in file.read_text()}
    assert users == {"vla/models/clip_build.py"}
