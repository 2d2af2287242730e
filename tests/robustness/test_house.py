"""Lesson: the files are a house. Imports run down, from the methods to the data, and one can read
it floor by floor."""
import ast

from conftest import ROOT

FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p
         for p in [*ROOT.glob("*.py"), *ROOT.glob("sources/*.py"), *ROOT.glob("figures/*.py")]}


def imports(path):
    """(names of our modules that it imports, those of them that are not imported at the top)"""
    tree, found, late = ast.parse(path.read_text(encoding="utf-8")), set(), set()
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module, *(f"{node.module}.{a.name}"
                            for a in node.names)] if isinstance(node, ast.ImportFrom) else []
        ours = {name for name in names if name in FILES}
        found |= ours
        late |= ours if node not in tree.body else set()
    return found, late


def floors():
    below = {name: imports(path)[0] for name, path in FILES.items()}
    floor = {}
    while len(floor) < len(below):
        ready = [name for name in below if name not in floor and below[name] <= floor.keys()]
        assert ready, f"a circle: {below.keys() - floor.keys()}"
        floor |= {name: 1 + max((floor[b] for b in below[name]), default=0) for name in ready}
    return floor


def test_seven_floors_and_no_circle():
    """The methods stand on trainer and evaluate, these on the command line, that on the data, these
    on files."""
    floor = floors()
    assert max(floor.values()) <= 7
    assert floor["smt"] > floor["trainer"] > floor["flags"] > floor["data"] > floor["sources.files"]
    assert floor["sources.files"] == floor["model"] == 1
    assert "trainer" not in imports(FILES["evaluate"])[0] | imports(FILES["sample"])[0]


def test_no_import_hides_in_a_function():
    """It would be there to dodge a circle."""
    assert {name: late for name, path in FILES.items() if (late := imports(path)[1])} == {}
