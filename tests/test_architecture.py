"""Who may import whom, read from the source: the one place where the house plan's arrows are checked."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("modeling_syncmask", "processing", "evaluation", "training", "retrieval", "hub_cards", "benchmarks")
FRONT_DOOR = ("modeling_syncmask/__init__.py", "modeling_syncmask/__main__.py")
# What travels to the Hub may need nothing else.
REMOTE = {"torch", "transformers", "PIL", "numpy", "safetensors", "huggingface_hub"}
FORBIDDEN = {  # of `syncmask.<room>`; "" stands for the model itself
    "processing": {"", "evaluation", "training", "retrieval", "hub_cards"},
    "evaluation": {"training", "retrieval", "hub_cards"},
    "training": {"retrieval", "hub_cards"},
    "retrieval": {"training", "hub_cards"},
    "hub_cards": {"training", "retrieval"},
}


def sources(*folders):
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in sorted(files)]


def imports(path):
    """List (dots before the name, module) of every import, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def home(module):
    """Return the room of `syncmask.x.y`, "" for the model, None for what is not the project's."""
    first, _, rest = module.partition(".")
    if first != "syncmask":
        return None
    room = rest.partition(".")[0]
    return room if room in ROOMS else ""


@pytest.mark.parametrize("path", sources(*ROOMS, "tests", "examples"))
def test_rooms_are_never_imported_by_their_bare_names(path):
    installed = set(ROOMS) - {"benchmarks"}  # those are run from a checkout, under their own name
    bare = [module for level, module in imports(path) if level == 0 and module.split(".")[0] in installed]
    assert bare == []
    assert all(level <= 1 for level, _ in imports(path)), "relative imports stay inside the room"


@pytest.mark.parametrize("path", sources(*FORBIDDEN))
def test_rooms_know_only_those_below_them(path):
    forbidden = FORBIDDEN[path.relative_to(ROOT).parts[0]]
    assert [module for _, module in imports(path) if home(module) in forbidden] == []


@pytest.mark.parametrize(
    "path",
    [
        *(param for param in sources("modeling_syncmask") if param.id not in FRONT_DOOR),
        *(param for param in sources("processing") if param.id.endswith("/processing_syncmask.py")),
    ],
)
def test_what_travels_to_the_hub_is_closed_in_itself(path):
    for level, module in imports(path):
        if level:
            assert "." not in module and (path.parent / f"{module}.py").is_file(), module
        else:
            first = module.split(".")[0]
            assert first in REMOTE or first in sys.stdlib_module_names, module


def test_the_check_sees_what_it_should(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("def f():\n    import syncmask.training.trainer\n    from .masks import x\nimport processing\n")
    assert sorted(imports(file)) == [(0, "processing"), (0, "syncmask.training.trainer"), (1, "masks")]
    assert [home(name) for name in ("syncmask.training.x", "syncmask", "syncmask.masks", "torch")] == [
        "training",
        "",
        "",
        None,
    ]
