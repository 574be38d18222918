"""What the site draws from the code when it is built, so that no page can say something else than the code does.

A line `<!-- drawn: NAME -->` in a page becomes what `DRAWN[NAME]` returns, `<!-- drawn: PATH -->` the file at that path
as a code block. A page's name in backquotes becomes a link with its title.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect as shapes

from partway import config
from partway.protocol import messages
from partway.protocol.session import TABLE, State
from partway.protocol.step import ALREADY, NOT_YET

ROOT = Path(__file__).parent.parent
ELSEWHERE = "https://unpkg.com/"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs calls this for every page."""
    drawn = re.sub(r"^<!-- drawn: (.+) -->$", lambda found: draw(found[1]), markdown, flags=re.MULTILINE)
    here = page.file.src_uri

    def link(found: re.Match[str]) -> str:
        name = found[1]
        path = ROOT / "docs" / name
        if name == here or not path.exists():
            return found[0]
        return f"[{path.read_text().splitlines()[0].removeprefix('# ')}]({name})"

    return re.sub(r"(?<!\[)`(?:docs/)?([a-z-]+\.md)`(?!\])", link, drawn)


def on_page_content(html: str, **_: Any) -> str:
    """Names of tests are long: in tables a line may break within them."""

    def breakable(found: re.Match[str]) -> str:
        return re.sub(r"(::|_|/)", r"\1<wbr>", found[0])

    return re.sub(r"(?<=<code>)tests/[^<]*::[^<]*(?=</code>)", breakable, html)


def on_post_build(config: Any) -> None:
    """The theme would fetch what old browsers lack, and a program for diagrams, which no page has: now it cannot."""
    for script in Path(config.site_dir).glob("assets/javascripts/*.js"):
        script.write_text(script.read_text(encoding="utf-8").replace(ELSEWHERE, ""), encoding="utf-8")


def draw(name: str) -> str:
    """A table, a picture, or a file of the repository. Raises `KeyError` for a name that is none."""
    path = ROOT / name
    if path.is_file():
        return f"```{ {'.py': 'python', '.toml': 'toml'}[path.suffix] }\n{path.read_text()}```"
    return DRAWN[name]()


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Markdown."""
    cells = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


# -- the session

DOES = {
    "hello": "noted",
    "key": "opened",
    "ready": "compared, noted",
    "letter": "as plan and turn say",
    "bye": "noted, or not yet",
    "again": "already, if the same",
    "fail": "gives up too",
    NOT_YET: "not yet",
    ALREADY: "already",
}
"""What a cell of `TABLE` means. A handler without words here does not build."""

ARROWS = {
    (State.JOINING, State.AGREEING): "every HELLO is in",
    (State.AGREEING, State.RUNNING): "every READY is in",
    (State.RUNNING, State.LEAVING): "no turn is left",
    (State.LEAVING, State.ENDED): "every BYE is in",
    **{(state, State.FAILED): "gives up" for state in (State.JOINING, State.AGREEING, State.RUNNING, State.LEAVING)},
}
"""From state to state; `tests/test_docs.py` compares them with what sessions do."""


def transitions() -> str:
    """`TABLE`: a line a message, a column a state."""
    kinds = list(dict.fromkeys(kind for row in TABLE.values() for kind in row))
    rows = []
    for kind in kinds:
        rules = [TABLE[state].get(kind) for state in State]
        rows.append((f"`{tag(kind)}`", *("*refused*" if r is None else DOES[r] for r in rules)))
    return table(("heard", *(state.value for state in State)), rows)


def tag(kind: type[messages.Message]) -> str:
    """A message's name on the wire."""
    info = shapes.type_info(kind)
    assert isinstance(info, shapes.StructType)
    return str(info.tag)


def states() -> str:
    """The states and `ARROWS` as a picture."""
    row = (state for state in State if state is not State.FAILED)
    places: dict[State, tuple[float, float]] = {state: (70 + 155 * i, 40) for i, state in enumerate(row)}
    places[State.FAILED] = (70 + 155 * 1.5, 140)
    drawn, words = [], []
    for (before, after), why in ARROWS.items():
        (x, y), (to_x, to_y) = places[before], places[after]
        if y == to_y:
            drawn.append(f'<path d="M{x + 45} {y} H{to_x - 49}" marker-end="url(#tip)"/>')
            words.append(f'<text class="why" x="{(x + to_x) / 2}" y="{y - 26}">{why}</text>')
        else:
            into = to_x + (x - to_x) / 7
            drawn.append(f'<path d="M{x} {y + 18} L{into:.0f} {to_y - 22}" marker-end="url(#tip)"/>')
    for state, (x, y) in places.items():
        drawn.append(f'<rect x="{x - 45}" y="{y - 18}" width="90" height="36" rx="6"/>')
        words.append(f'<text x="{x}" y="{y + 5}">{state.value}</text>')
    words.append('<text class="why" x="470" y="145">this party gives up, or hears FAIL</text>')
    tip = '<marker id="tip" orient="auto" markerWidth="8" markerHeight="8" refX="5" refY="3" viewBox="0 0 6 6">'
    tip = f'<defs>{tip}<path d="M0 0 L6 3 L0 6 z"/></marker></defs>'
    label = "; ".join(f"from {a.value} to {b.value}: {why}" for (a, b), why in ARROWS.items())
    view = f'viewBox="0 0 760 170" role="img" aria-label="{label}"'
    return f'<svg class="states" xmlns="http://www.w3.org/2000/svg" {view}>{tip}{"".join(drawn + words)}</svg>'


def reasons() -> str:
    """`Reason`: what a party may say of its failure."""
    words = docstrings(messages.Reason)
    return table(("number", "name", "meaning"), [(str(r.value), f"`{r.name}`", words[r.name]) for r in messages.Reason])


# -- the settings


def docstrings(kind: type) -> dict[str, str]:
    """What stands below each field of a class, by name, in one line each."""
    (body,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            target = field.target if isinstance(field, ast.AnnAssign) else getattr(field, "targets", [None])[0]
            if isinstance(target, ast.Name):
                words = " ".join(inspect.cleandoc(str(below.value.value)).split())
                found[target.id] = words.replace("`[", "`\\[")
    return found


def settings(kind: type[msgspec.Struct], section: str = "") -> str:
    """A table of every key, its values and default, then those of the tables within it."""
    words, rows, within = docstrings(kind), [], []
    for field in msgspec.structs.fields(kind):
        values = shapes.type_info(field.type)
        inner = list(structs(values))
        here = f"{section}.{field.encode_name}" if section else field.encode_name
        if isinstance(values, shapes.DictType):
            here += ".NAME"
        within += [f"### `[{here}]`\n\n{settings(each, here)}" for each in inner]
        if section:
            rows.append((f"`{field.encode_name}`", said(values), default(field), words.get(field.name, "")))
    own = [table(("key", "values", "default", "meaning"), rows)] if rows else []
    return "\n\n".join(own + within)


def structs(values: shapes.Type) -> Iterator[type[msgspec.Struct]]:
    """The tables of settings that a key may hold."""
    if isinstance(values, shapes.StructType):
        yield values.cls
    elif isinstance(values, shapes.UnionType):
        for each in values.types:
            yield from structs(each)
    elif isinstance(values, shapes.DictType) and isinstance(values.value_type, shapes.StructType):
        yield values.value_type.cls
    elif isinstance(values, shapes.VarTupleType) and isinstance(values.item_type, shapes.StructType):
        yield values.item_type.cls


def said(values: shapes.Type) -> str:
    """A type in words."""
    match values:
        case shapes.LiteralType():
            return " or ".join(f"`{json(v)}`" for v in values.values)
        case shapes.IntType() | shapes.FloatType():
            least = [f"{word} {v:g}" for word, v in (("from", values.ge), ("above", values.gt)) if v is not None]
            most = [f"{word} {v:,.15g}" for word, v in (("to", values.le), ("below", values.lt)) if v is not None]
            most = [] if isinstance(values, shapes.IntType) and (values.lt or 0) >= 2**31 else most
            kind = "whole number" if isinstance(values, shapes.IntType) else "number"
            return " ".join([kind, *least, *most])
        case shapes.BoolType():
            return "`true` or `false`"
        case shapes.StrType():
            return "text"
        case shapes.ListType() | shapes.VarTupleType():
            return f"list of {said(values.item_type)}"
        case shapes.DictType():
            return "table"
        case shapes.UnionType():
            return " or ".join(said(each) for each in values.types if not isinstance(each, shapes.NoneType))
    return "table, below" if isinstance(values, shapes.StructType) else "any"


def default(field: msgspec.structs.FieldInfo) -> str:
    """As TOML has it; a table's is that of each of its keys."""
    if field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
    else:
        value = field.default
    if value is msgspec.NODEFAULT:
        return "*must be given*"
    if value is None:
        return "*left out*"
    if isinstance(value, msgspec.Struct):
        given = [f.encode_name for f in msgspec.structs.fields(value)]
        pairs = [f"{name} = {json(getattr(value, name))}" for name in given]
        simple = all(not isinstance(getattr(value, name), msgspec.Struct) for name in given)
        return f"`{{ {', '.join(pairs)} }}`" if simple and len(pairs) < 5 else "as below"
    return f"`{json(value)}`"


def json(value: Any) -> str:
    """A value as TOML has it, too, where it is no table.

    >>> json(10_000_000), json("adam")
    ('10_000_000', '"adam"')
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:_}" if whole and value > 9999 else msgspec.json.encode(value).decode()


DRAWN: dict[str, Callable[[], str]] = {
    "transitions": transitions,
    "states": states,
    "reasons": reasons,
    "settings of a job": lambda: settings(config.Job),
    "settings of training": lambda: settings(config.Training, "training"),
    "settings of a site": lambda: settings(config.Site),
    "settings of a server": lambda: settings(config.Server),
}
