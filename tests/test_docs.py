"""The site builds, nothing in it points into the void or to another host, and its pages say what the code does."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import msgspec
import pytest
import typer

import partway
from federations import job_of, small
from partway import cli, config
from partway.errors import PartwayError
from partway.protocol.messages import Reason
from partway.protocol.session import TABLE, Session, State

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()


def build(target: Path, configuration: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    words = ["-m", "mkdocs", "build", "--strict", "--config-file", str(configuration), "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=120)
    assert not (done.returncode == 0 and "WARNING" in done.stderr), done.stderr
    return done


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(target)
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in target.glob("*.html")} >= {Path(name).stem for name in PAGES}
    return target


class Page(HTMLParser):
    """What a page refers to, and the places in it that can be referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        """Where a reader may go."""
        self.loads: list[str] = []
        """What a browser fetches without being asked."""
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.places.add(value)
            elif name == "href" and tag in ("a", "area"):
                self.links.append(value or "")
            elif name in ("src", "href", "srcset", "data") and value:
                self.loads.append(value)
            elif name == "style" and value:
                self.loads += re.findall(r"url\(([^)]*)\)", value)


def broken(folder: Path, page: Path) -> list[str]:
    """Internal links and files of a page that are not there."""
    found, here = [], Page(page.read_text())
    for link in here.links + here.loads:
        where = urlsplit(link)
        if where.scheme or where.netloc:
            continue
        path = page if not where.path else (page.parent / unquote(where.path)).resolve()
        if page.name == "404.html":  # it is shown at any address, so what it names begins at the root
            path = folder / where.path.lstrip("/") if where.path else page
        path = path / "index.html" if path.is_dir() else path
        anchor = unquote(where.fragment)
        if not path.exists() or (anchor and path.suffix == ".html" and anchor not in Page(path.read_text()).places):
            found.append(f"{page.name}: {link}")
    return found


def from_elsewhere(path: Path) -> list[str]:
    """What a file of the site would fetch from another host."""
    text = path.read_text()
    if path.suffix == ".html":
        fetched = Page(text).loads + re.findall(r"url\(([^)]*)\)|@import ([^;]*)", "".join(re.findall(STYLE, text)))
    elif path.suffix == ".css":
        fetched = [a or b for a, b in re.findall(r"url\(([^)]*)\)|@import ([^;]*)", text)]
    else:  # a script: hosts that serve scripts
        fetched = re.findall(r"https?://(?:unpkg|cdn|fonts|www\.google|polyfill|esm)\S{0,40}", text)
    return [f"{path.name}: {word}" for word in fetched if re.match(r"""["']?(?:https?:)?//""", str(word))]


STYLE = r"<style>(.*?)</style>"


def test_every_internal_link_resolves(site: Path) -> None:
    pages = sorted(site.glob("*.html"))
    assert len(pages) > len(PAGES)
    assert not [fault for page in pages for fault in broken(site, page)]


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css", ".js")]
    assert len(files) > 20
    assert not [fault for path in files for fault in from_elsewhere(path)]
    assert not [page.name for page in site.glob("*.html") if 'class="mermaid"' in page.read_text()]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.html", '<script src="https://unpkg.com/x"></script>'),
        ("page.html", '<link rel="stylesheet" href="//fonts.example/css">'),
        ("page.html", '<img src="http://example.org/pixel.png">'),
        ("style.css", "@font-face { src: url('https://example.org/font.woff2') }"),
        ("style.css", '@import "https://example.org/x.css";'),
        ("script.js", 'load("https://unpkg.com/x")'),
    ],
)
def test_a_planted_fetch_is_found(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert from_elsewhere(tmp_path / name)


def test_a_planted_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<a id="here" href="#here">fine</a> <a href="other.html">gone</a> <a href="#there">gone</a>')
    assert broken(tmp_path, page) == ["page.html: other.html", "page.html: #there"]


def test_a_dead_link_or_an_unknown_drawing_does_not_build(tmp_path: Path) -> None:
    for number, text in enumerate(("# A page\n\n[gone](gone.md)\n", "# A page\n\n<!-- drawn: no such thing -->\n")):
        folder = tmp_path / str(number)
        (folder / "docs").mkdir(parents=True)
        (folder / "docs" / "index.md").write_text(text)
        settings = f"site_name: x\nhooks: [{DOCS / 'hooks.py'}]\nvalidation: {{ links: {{ not_found: warn }} }}\n"
        (folder / "mkdocs.yml").write_text(settings)
        assert build(folder / "site", folder / "mkdocs.yml").returncode != 0


# -- what is drawn


def test_the_examples_of_the_hooks() -> None:
    assert doctest.testmod(hooks) == (0, 1)


def test_the_transition_table_is_the_code_s() -> None:
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in hooks.transitions().splitlines()]
    assert head[1:] == [state.value for state in State]
    drawn = {(row[0].strip("`"), state): cell for row in rows for state, cell in zip(State, row[1:], strict=True)}
    for state, rules in TABLE.items():
        said = {hooks.tag(kind): hooks.DOES[rule] for kind, rule in rules.items()}
        assert {kind: cell for (kind, of), cell in drawn.items() if of is state and cell != "*refused*"} == said


def test_the_states_are_drawn_as_sessions_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A federation that runs to its end, and one for each state in which a party gives up."""
    seen: set[tuple[State, State]] = set()

    def spy(session: Session, name: str, value: object) -> None:
        if name == "state" and (before := session.__dict__.get("state", value)) != value:
            assert isinstance(value, State)
            seen.add((before, value))
        object.__setattr__(session, name, value)

    monkeypatch.setattr(Session, "__setattr__", spy)
    small(job_of(epochs=1)).run()
    assert State.FAILED not in {after for _, after in seen}
    for state in list(State)[:4]:
        whole = small(job_of(epochs=1))

        def give_up(*_: object, state: State = state, session: Session = whole.parties["a"].party.session) -> None:
            if session.state is state:
                session.fail(Reason.STOPPED)

        with contextlib.suppress(PartwayError):  # whether the others miss anything depends on when
            whole.run(watch=give_up)
    assert seen == hooks.ARROWS.keys()


@pytest.mark.parametrize("kind", [config.Job, config.Site, config.Server])
def test_every_setting_is_drawn(kind: type[msgspec.Struct]) -> None:
    drawn = hooks.settings(kind)

    def keys(kind: type[msgspec.Struct]) -> Iterator[str]:
        for field in msgspec.structs.fields(kind):
            inner = list(hooks.structs(msgspec.inspect.type_info(field.type)))
            named = ".NAME" if typing.get_origin(field.type) is dict else ""
            yield f"{field.encode_name}{named}]`" if inner else f"| `{field.encode_name}` |"
            for each in inner:
                yield from keys(each)

    assert not [key for key in keys(kind) if key not in drawn and key != "| `roster` |"]


# -- what pages say


def test_every_test_that_is_named_is_there() -> None:
    named = [found for page in PAGES.values() for found in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)]
    assert len(named) > 10
    for path, test in named:
        assert f"\ndef {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


def commands() -> list[str]:
    blocks = [b for page in PAGES.values() for b in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)]
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip().startswith("partway ")]


@pytest.mark.parametrize("line", commands())
def test_every_command_can_be_typed(line: str) -> None:
    command, (_, *words) = typer.main.get_command(cli.app), line.split()
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(line, words)


def spoken() -> set[str]:
    """Every text that the code may say; where it puts a value in, a dash."""
    found = set()
    for path in Path(partway.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "—" for p in node.values]
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_every_error_line_is_one_of_the_code_s() -> None:
    section = PAGES["between-machines.md"].partition("## When a line says")[2].partition("###")[0]
    lines = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
    assert len(lines) > 20
    said = spoken()

    def is_said(line: str) -> bool:
        return all(any(part in text for text in said) for part in re.split("—:? ?", line) if len(part) > 3)

    assert not [line for line in lines if not is_said(line)]
    assert not is_said("— cannot be reached, or has gone fishing")


def test_the_page_on_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGES["python.md"]
    names = re.findall(r"^\| `(\w+)` \|", page.partition("## simulate")[0], flags=re.MULTILINE)
    assert sorted(names) == partway.__all__
    shown = inspect.signature(partway.simulate).parameters
    assert re.search(r"`simulate\((.*?)\)`", page)[1].replace("*, ", "") == ", ".join(
        name if p.default is p.empty else f"{name}={p.default}" for name, p in shown.items()
    )
    fields = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", page.partition("## Result")[2], re.MULTILINE)))
    assert set(fields) >= set(partway.Result.__dataclass_fields__)
    exec("".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)), {"__name__": "page"})
    assert "['hidden.0.bias'" in (said := capsys.readouterr().out)
    assert said.splitlines()[-1] == re.search(r"prints `(.*)`$", page, re.MULTILINE)[1]
