"""The rooms of docs/architecture.md: imports go one way, and every module has a name of its own."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "pyro_flowguides"
#: A module may import its own room and the rooms before it.
ROOMS = [
    *("nn", "transforms", "flows", "programs", "guides", "diagnostics", "inference", "studies"),
    *("vae.networks", "vae.decoders", "vae.models", "vae.training"),
]
#: Single modules that belong to a room of another name.
MEMBERS = {"flow_registry": "flows", "vae.__main__": "vae.training"}
#: Packages of rooms, which collect the names of their rooms.
COLLECTIONS = ["", "vae"]


def full_name(path: Path) -> str:
    """Return the dotted name of a module: ``pyro_flowguides/nn/mlp.py -> nn.mlp``, without the name of the package."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {full_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in PATHS.items()}
IMPORTABLE = [name for name in PATHS if not name.endswith("__main__")]


def room_of(module: str) -> str | None:
    """Return the room of a module, or None if it belongs to none."""
    module = MEMBERS.get(module, module)
    return next((room for room in ROOMS if module == room or module.startswith(f"{room}.")), None)


def imports(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Iterate over the lines and modules of all imports from this package, those within functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                yield node.lineno, nearest_module(name.removeprefix(PACKAGE).removeprefix("."))


def nearest_module(name: str) -> str:
    """Return the module that holds a dotted name: itself, or the module that defines or exports it."""
    while name not in PATHS:
        name = name.rpartition(".")[0]
    return name


def upward_imports(module: str, tree: ast.AST) -> list[str]:
    """Describe the imports of a module from later rooms, and from packages that collect names of all rooms."""
    own = room_of(module)
    allowed = ROOMS if own is None else ROOMS[: ROOMS.index(own) + 1]
    return [
        f"{module}, line {line}: {imported or PACKAGE}"
        for line, imported in imports(module, tree)
        if room_of(imported) not in allowed and not (module in COLLECTIONS and imported in COLLECTIONS)
    ]


def test_every_module_is_in_a_room():
    assert [name for name in PATHS if room_of(name) is None] == COLLECTIONS


def test_the_documentation_lists_the_rooms_in_order():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = [room.rstrip("/").removesuffix(".py") for room in re.findall(r"^\| `([^`]*)` \|", page, re.MULTILINE)]
    assert rooms == list(dict.fromkeys(room.partition(".")[0] for room in ROOMS))


def test_the_documentation_names_what_exists():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    names = re.findall(rf"`((?:{'|'.join(ROOMS)})(?:\.\w+)+)`", page.partition("## The way of one fit")[2])
    assert len(names) > 10
    for name in names:
        module = nearest_module(name)
        value = importlib.import_module(f"{PACKAGE}.{module}")
        for part in name.removeprefix(module).split(".")[1:]:
            value = getattr(value, part)


@pytest.mark.parametrize("module", PATHS)
def test_imports_go_one_way(module):
    assert upward_imports(module, TREES[module]) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nn.mlp", "from pyro_flowguides.transforms import Flow"),
        ("transforms.flow", "def f():\n    import pyro_flowguides.flows"),
        ("flow_registry", "from pyro_flowguides import guides"),
        ("programs.program", "import pyro_flowguides as fg"),
        ("inference.run", "from pyro_flowguides.vae import VAE"),
        ("vae.decoders.wavenet", "from pyro_flowguides.vae.models.vae import VAE"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert len(upward_imports(module, ast.parse(source))) == 1


def test_module_names_are_unique():
    stems = Counter(path.stem for path in PATHS.values())
    assert [stem for stem, count in stems.items() if count > 1] == ["__init__"]


@pytest.mark.parametrize("module", IMPORTABLE)
def test_every_module_says_what_is_public(module):
    targets = [
        target.id
        for node in TREES[module].body
        for target in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)])
        if isinstance(target, ast.Name)
    ]
    assert "__all__" in targets


@pytest.mark.parametrize("module", IMPORTABLE)
def test_public_names_exist_and_hide_no_module(module):
    loaded = importlib.import_module(f"{PACKAGE}.{module}".rstrip("."))
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []
    assert len(set(loaded.__all__)) == len(loaded.__all__)
    parent, _, stem = module.rpartition(".")
    if module:
        package = importlib.import_module(f"{PACKAGE}.{parent}".rstrip("."))
        assert isinstance(getattr(package, stem), ModuleType)
        assert getattr(package, stem) is loaded
