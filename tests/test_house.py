"""The house keeps its shape: imports between rooms run one way, and no module grows too large.

docs/architecture.md draws it. A module's imports are read off its source, also those inside its
functions, but not those for type checkers only.
"""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "adaptive_moe"
MOST_LINES, MOST_ROOMS, MOST_FLOORS = 480, 12, 9

# From the top: a room imports only from floors below its own.
FLOORS = (
    ("cli",),
    ("engines",),
    ("hook",),
    ("store", "report"),
    ("tuning", "settings"),
    ("kernels",),
    ("policy", "models"),
    ("shape",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name, the package itself as `adaptive_moe`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the package that it imports, now or later."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    found = set()
    for node in _running(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules() else node.module)
    return frozenset(name for name in found if name in modules() and name != module)


def _running(node):
    """The nodes below, without what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _running(child)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_at_most_twelve_rooms_at_top_level_and_each_has_its_floor():
    rooms = {room(name) for name in modules()} - {"", "__main__"}
    assert len(rooms) <= MOST_ROOMS
    assert rooms == set(FLOOR)


def test_imports_between_rooms_run_one_way():
    wrong = [
        f"{module} imports {other}"
        for module in modules()
        for other in imports(module)
        if room(module) in FLOOR
        and room(other) in FLOOR
        and room(module) != room(other)
        and FLOOR[room(module)] >= FLOOR[room(other)]
    ]
    assert wrong == []


def test_no_module_imports_what_imports_it_in_the_end():
    """Also within a room. A room's own __init__ may be imported by its modules."""
    state: dict[str, bool] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) is not False, " -> ".join((*path, module))
        if module in state:
            return
        state[module] = False
        for other in sorted(imports(module)):
            visit(other, (*path, module))
        state[module] = True

    for module in sorted(modules()):
        visit(module, ())


def test_at_most_nine_floors_of_rooms():
    @cache
    def height(name: str) -> int:
        below = {
            room(other) for module in modules() if room(module) == name for other in imports(module)
        }
        return 1 + max((height(other) for other in below - {name, "", "__main__"}), default=0)

    assert max(height(name) for name in FLOOR) <= MOST_FLOORS


def test_no_module_is_longer_than_a_reader_can_hold():
    long = {
        name: lines
        for name, path in modules().items()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert long == {}


def test_the_probe_sees_imports_inside_functions_and_not_those_for_types(monkeypatch, tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import adaptive_moe.cli\n"
        "def later():\n    from adaptive_moe.policy import table\n"
    )
    monkeypatch.setitem(modules(), "adaptive_moe.probe", source)
    assert imports("adaptive_moe.probe") == {"adaptive_moe.policy.table"}


# Names that a protocol or a habit asks of several modules: AITER's own function and our stand-ins
# for it, the entry points of plugins and sorts, the logger, what only type checkers see.
SHARED_NAMES = {"moe_sorting", "register", "sorts", "logger", "TYPE_CHECKING"}


def test_no_public_name_has_two_homes():
    homes: dict[str, set[str]] = {}
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for name in _defined(node):
                homes.setdefault(name, set()).add(module)
    twice = {
        name: sorted(places)
        for name, places in homes.items()
        if len(places) > 1 and not name.startswith("_") and name not in SHARED_NAMES
    }
    assert not twice


def _defined(node):
    """Names that a statement at the top of a module defines; imports define none."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
