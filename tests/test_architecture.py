"""The plan of the house, held by the code: who may import whom, what is never used, and which names are public.

Every check takes (path, source), so that each is shown to find what it looks for in a planted line too.
"""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import partway

SOURCE = Path(partway.__file__).parent


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the modules of one room may import beside the standard library and their own room."""

    rooms: str
    """Rooms or single modules of Partway; "*" for all."""
    installed: str = "*"
    """Installed packages; "*" for all."""
    never: str = ""
    """Modules refused in any case, those of the standard library among them."""


CORE = "errors plan config protocol model privacy wire"
ACCOUNTS = f"{CORE} shapes cost policy ledger egress"
PROCESS = f"{ACCOUNTS} transport data train party blueprint pretrained shipped assembly outcome pki report"
"""All that a process at a site or a server is made of."""

HOUSE = {
    "errors": Room(rooms="", installed=""),
    "plan": Room(rooms="errors", installed=""),
    "config": Room(rooms="errors plan", installed="msgspec"),
    "protocol": Room(rooms="errors plan", installed="msgspec", never="socket asyncio time datetime os pathlib random"),
    "model": Room(rooms="errors", installed="msgspec peft safetensors torch"),
    "apart": Room(rooms="errors model", installed="msgspec safetensors torch"),
    "privacy": Room(rooms="errors", installed="numpy torch cryptography"),
    "wire": Room(rooms="errors protocol.messages", installed="msgspec numpy torch", never="socket asyncio"),
    "transport": Room(rooms="errors", installed="grpc"),
    "shapes": Room(rooms=CORE),
    "cost": Room(rooms=f"{CORE} shapes"),
    "policy": Room(rooms=f"{CORE} shapes cost"),
    "ledger": Room(rooms="errors", never="torch"),
    "egress": Room(rooms=f"{CORE} shapes cost policy ledger"),
    "data": Room(rooms="errors config plan"),
    "train": Room(rooms="errors plan protocol model privacy shapes cost data"),
    "party": Room(rooms=f"{ACCOUNTS} train.worker", never="time socket"),
    "attack": Room(rooms="errors model privacy wire data train"),
    "pki": Room(rooms="errors config", never="torch"),
    "report": Room(rooms=f"{CORE} shapes cost"),
    "blueprint": Room(rooms=f"{CORE} data", never="socket"),
    "pretrained": Room(rooms=f"{CORE} data blueprint", never="socket"),
    "shipped": Room(rooms=f"{CORE} apart data blueprint pki", never="socket"),
    "places": Room(rooms=f"{CORE} data blueprint", never="socket"),
    "assembly": Room(rooms=f"{ACCOUNTS} data train party blueprint pretrained report", never="socket"),
    "outcome": Room(rooms=f"{ACCOUNTS} data train party assembly report", never="socket"),
    "site": Room(rooms=PROCESS),
    "server": Room(rooms=PROCESS),
    "simulation": Room(rooms="*"),
    "compare": Room(rooms=f"{PROCESS} simulation"),
    "finished": Room(rooms=f"{CORE} data train blueprint assembly report"),
    "equality": Room(rooms="*"),
    "local": Room(rooms="*"),
    "demo": Room(rooms="*"),
    "cli": Room(rooms="*"),
    "": Room(rooms="*"),
}
"""`""` is the package's own `__init__`."""

LAZY = {"", "cli", "demo"}
"""Rooms where an import may stand inside a function."""
OPTIONAL = "matplotlib peft"
"""Extras: imported in the function that needs them, in any room."""

CODE_IN_DISGUISE = (
    "pickle _pickle marshal shelve dill cloudpickle joblib builtins.eval builtins.exec "
    "torch.load torch.save torch.package torch.jit.load torch.export.load"
)
"""What turns bytes or text into code that runs, and what writes such bytes."""

Files = dict[str, str]
"""Module name, such as "partway.plan.batches" -> source."""


def house() -> Files:
    files = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ("partway", *path.relative_to(SOURCE).with_suffix("").parts)
        files[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return files


def room_of(module: str) -> str:
    """
    >>> room_of("partway.plan.batches"), room_of("partway.__main__"), room_of("partway")
    ('plan', 'cli', '')
    """
    _, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return "cli" if room == "__main__" else room


def within(module: str, names: str) -> bool:
    """Whether `module` is one of `names` (separated by spaces) or lies in one.

    >>> within("train.worker", "errors train"), within("train.worker", "train.metrics"), within("anything", "*")
    (True, False, True)
    """
    return names == "*" or any(module == name or module.startswith(f"{name}.") for name in names.split())


@dataclass(frozen=True)
class Import:
    module: str
    """`from partway.plan import batches` is partway.plan.batches, `from torch import load` is torch.load."""
    line: int
    in_function: bool
    for_types: bool
    """Under `if TYPE_CHECKING`: it makes no cycle, and knows the other room all the same."""


def imports(source: str) -> Iterator[Import]:
    def walk(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                start = "." * child.level + (child.module or "")
                names = [f"{start}.{alias.name}" for alias in child.names]
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, in_function or function, for_types or types)
                continue
            yield from (Import(name, child.lineno, in_function, for_types) for name in names)

    return walk(ast.parse(source), False, False)


def faults_of_table(module: str, source: str) -> Iterator[str]:
    """Imports that the table of the house does not allow."""
    room = room_of(module)
    may = HOUSE.get(room)
    if may is None:
        yield f"{module}: {room} is no room of the house; its line in HOUSE comes first"
        return
    for found in imports(source):
        top, _, rest = found.module.partition(".")
        here = f"{module}:{found.line} imports {found.module}"
        if not top:
            yield f"{here}: write the whole name"
        elif top == "partway":
            own = room_of(found.module) == room and room != ""
            if not (own or rest == "__version__" or within(rest, may.rooms)):
                yield f"{here}: {room} may import only {may.rooms or 'nothing'}"
        elif within(found.module, may.never):
            yield f"{here}: never in {room}"
        elif top not in sys.stdlib_module_names and not within(top, may.installed):
            yield f"{here}: of what is installed, {room} may import only {may.installed or 'nothing'}"


def faults_of_place(module: str, source: str) -> Iterator[str]:
    """Imports that hide inside a function."""
    for found in imports(source):
        if found.in_function and room_of(module) not in LAZY and not within(found.module, OPTIONAL):
            yield f"{module}:{found.line} imports {found.module} inside a function"


def faults_of_code(module: str, source: str) -> Iterator[str]:
    """Ways for bytes or text to become code that runs."""
    for found in imports(source):
        if within(found.module, CODE_IN_DISGUISE):
            yield f"{module}:{found.line} imports {found.module}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in {"eval", "exec", "__import__"}:
            yield f"{module}:{node.lineno} uses {node.id}"
        elif isinstance(node, ast.Attribute) and within(ast.unparse(node), CODE_IN_DISGUISE):
            yield f"{module}:{node.lineno} uses {ast.unparse(node)}"
        elif isinstance(node, ast.keyword) and ast.unparse(node) in {"allow_pickle=True", "shell=True"}:
            yield f"{module}:{node.value.lineno} passes {ast.unparse(node)}"


def cycle(files: Files) -> list[str] | None:
    """One import cycle, if there is any, of imports at the top of modules."""

    def module(name: str) -> str:
        return name if name in files else name.rpartition(".")[0]

    graph = {
        name: {module(found.module) for found in imports(source) if not (found.in_function or found.for_types)}
        & (files.keys() - {name})
        for name, source in files.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


@pytest.mark.parametrize("check", [faults_of_table, faults_of_place, faults_of_code])
def test_the_house_is_as_planned(check):
    faults = [fault for module, source in house().items() for fault in check(module, source)]
    assert not faults, "\n" + "\n".join(faults)


def test_no_import_cycle():
    assert cycle(house()) is None


def test_every_room_is_a_package():
    folders = {path.parent for path in SOURCE.rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


@pytest.mark.parametrize(
    ("check", "module", "line"),
    [
        (faults_of_table, "partway.plan.plan", "import numpy"),
        (faults_of_table, "partway.plan.plan", "from partway.protocol import net"),
        (faults_of_table, "partway.protocol.net", "import torch.nn as nn"),
        (faults_of_table, "partway.protocol.net", "from time import monotonic"),
        (faults_of_table, "partway.protocol.net", "def f():\n    import os.path"),
        (faults_of_table, "partway.model.cut", "from partway.plan.plan import Plan"),
        (faults_of_table, "partway.wire.frames", "from partway.protocol import session"),
        (faults_of_table, "partway.transport.grpc", "from partway.wire import frames"),
        (faults_of_table, "partway.transport.grpc", "import torch"),
        (faults_of_table, "partway.train.worker", "from partway.wire.frames import encode"),
        (faults_of_table, "partway.party", "from partway.train import metrics"),
        (faults_of_table, "partway.party", "import time"),
        (faults_of_table, "partway.site.agent", "from partway.server import control"),
        (faults_of_table, "partway.server.control", "import partway.site.agent"),
        (faults_of_table, "partway.server.control", "if TYPE_CHECKING:\n    from partway.attack import view"),
        (faults_of_table, "partway.attack.view", "from partway.site import agent"),
        (faults_of_table, "partway.plan.plan", "from partway import simulate"),
        (faults_of_table, "partway.plan.plan", "from . import batches"),
        (faults_of_table, "partway.kitchen", ""),
        (faults_of_place, "partway.train.worker", "def f():\n    import torch"),
        (faults_of_code, "partway.wire.frames", "import pickle"),
        (faults_of_code, "partway.wire.frames", "from torch import load"),
        (faults_of_code, "partway.wire.frames", "torch.load(path, weights_only=True)"),
        (faults_of_code, "partway.wire.frames", "numpy.load(path, allow_pickle=True)"),
        (faults_of_code, "partway.wire.frames", "eval(text)"),
    ],
)
def test_a_planted_fault_is_found(check, module, line):
    assert list(check(module, line))


@pytest.mark.parametrize(
    ("check", "module", "line"),
    [
        (faults_of_table, "partway.wire.frames", "from partway.protocol.messages import Hello"),
        (faults_of_table, "partway.wire.frames", "from partway.protocol import messages"),
        (faults_of_table, "partway.party", "from partway.train.worker import Worker"),
        (faults_of_table, "partway.plan.schedules", "from partway.plan import plan"),
        (faults_of_table, "partway.site.agent", "from partway import __version__"),
        (faults_of_table, "partway.__main__", "from partway.cli import main"),
        (faults_of_place, "partway.cli", "def f():\n    import torch"),
        (faults_of_place, "partway.attack.view", "def f():\n    import matplotlib.pyplot as plt"),
        (faults_of_code, "partway.train.worker", "network.eval()\nsafetensors.torch.load(data)"),
    ],
)
def test_what_is_allowed_is_not_found(check, module, line):
    assert not list(check(module, line))


def test_a_planted_cycle_is_found():
    files = {"partway.a": "from partway import b", "partway.b": "def f():\n    import partway.a"}
    assert cycle(files) is None
    assert cycle(files | {"partway.b": "from partway.a import f"}) is not None


def test_sizes_are_printed(capsys):
    """A smell, not a limit."""
    files = {name: len(source.splitlines()) for name, source in house().items()}
    functions = {
        f"{name}.{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for name, source in house().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    p90 = statistics.quantiles(files.values(), n=10, method="inclusive")[-1]
    over = sum(length > 60 for length in functions.values()) / len(functions)
    longest_file, longest = max(files, key=files.__getitem__), max(functions, key=functions.__getitem__)
    with capsys.disabled():
        print(f"\nsizes: {len(files)} files, {sum(files.values())} lines, p90 {p90:.0f}, ", end="")
        print(f"longest {longest_file} ({files[longest_file]}); {len(functions)} functions, ", end="")
        print(f"longest {longest} ({functions[longest]}), {over:.1%} over 60 lines")


@pytest.mark.parametrize("name", partway.__all__)
def test_every_public_name_is_there(name):
    assert getattr(partway, name) is not None


def test_public_names_are_sealed():
    visible = {name for name in vars(partway) if not name.startswith("_")}
    visible -= {room for room in HOUSE if room not in partway.__all__}  # submodules that a test has imported
    assert visible - {"annotations"} <= set(partway.__all__)
    assert dir(partway) == partway.__all__ == sorted(partway.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = partway.no_such_name


def test_names_for_the_type_checker_are_those_at_run_time():
    promised = {found.module.rpartition(".") for found in imports(house()["partway"]) if found.for_types}
    assert {name: home for home, _, name in promised} == partway._HOMES


def test_import_is_light():
    command = "import sys, partway; print(*sorted({'torch', 'numpy', 'grpc', 'rich'} & sys.modules.keys()))"
    answer = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []
