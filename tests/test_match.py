"""Which patients parties have in common: who learns what, from files that hold no id."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partway.errors import DataError, UsageError
from partway.privacy.intersection import again, blind, common, new_secret
from partway.site import match

ids = st.lists(st.text(st.characters(codec="utf-8", exclude_characters=","), min_size=1), unique=True, max_size=12)


@given(ids, ids)
def test_what_is_common_is_found_and_nothing_else(mine: list[str], theirs: list[str]) -> None:
    a, b = new_secret(), new_secret()
    found = common(again(blind(mine, a), b), blind(theirs, b), a)
    assert found == [theirs.index(name) if name in theirs else -1 for name in mine]


def test_points_under_other_secrets_say_nothing() -> None:
    a, b, c = new_secret(), new_secret(), new_secret()
    assert common(again(blind(["x"], a), b), blind(["x"], c), a) == [-1]
    assert not set(blind(["x", "y"], a)) & set(blind(["x", "y"], b))


def table(folder: Path, name: str, ids: list[str]) -> Path:
    path = folder / f"{name}.csv"
    path.write_text("patient,value\n" + "".join(f"{n},1\n" for n in ids))
    return path


def matched(folder: Path, only_common: bool = False) -> dict[str, list[str]]:
    """Three parties, from their files to their lists of ids."""
    own = {"asker": [f"patient-{n}" for n in range(30)]}
    own |= {"one": [f"patient-{n}" for n in range(10, 50)], "two": [f"patient-{n}" for n in range(20)]}
    records = {name: table(folder, name, mine) for name, mine in own.items()}
    match.ask(records["asker"], "patient", folder / "asker.kept", folder / "asked")
    answers = {name: folder / f"{name}.answered" for name in ("one", "two")}
    for name, to in answers.items():
        match.answer(records[name], "patient", folder / "asked", folder / f"{name}.kept", to)
    found = match.agree(folder / "asker.kept", answers, folder / "agreed", only_common)
    assert found.here == ({"one": 20, "two": 20} if not only_common else {"one": 10, "two": 10})
    for name in answers:
        match.take(folder / f"{name}.kept", folder / "agreed" / f"{name}.agreed", folder / f"{name}.ids")
    lists = {"asker": folder / "agreed" / "ids.txt", "one": folder / "one.ids", "two": folder / "two.ids"}
    return {name: path.read_text().splitlines() for name, path in lists.items()}


@pytest.mark.parametrize("only_common", [False, True])
def test_one_list_of_tokens_and_behind_each_the_same_patient(tmp_path: Path, only_common: bool) -> None:
    lists = matched(tmp_path, only_common)
    rows = [[line.split(",") for line in lines] for lines in lists.values()]
    assert len({len(lines) for lines in rows}) == 1
    for (token, patient), *others in zip(*rows, strict=True):
        assert all(other[0] == token for other in others)
        assert all(other[1] in ("", patient) for other in others)
    assert [sum(bool(line[1]) for line in lines) for lines in rows] == ([30, 20, 20] if not only_common else [10] * 3)


def test_no_file_that_travels_holds_an_id(tmp_path: Path) -> None:
    matched(tmp_path)
    travelling = [tmp_path / "asked", *tmp_path.glob("*.answered"), *(tmp_path / "agreed").glob("*.agreed")]
    assert len(travelling) == 5
    assert not any(b"patient-" in path.read_bytes() for path in travelling)
    assert all(b"patient-" in path.read_bytes() for path in tmp_path.glob("*.kept"))  # which stay


def test_what_is_wrong_is_told_in_one_line(tmp_path: Path) -> None:
    records, twice = table(tmp_path, "records", ["a", "b"]), table(tmp_path, "twice", ["a", "a"])
    kept = itertools.count()

    def asked(path: Path, column: str = "patient") -> None:
        match.ask(path, column, tmp_path / f"kept{next(kept)}", tmp_path / "asked")

    with pytest.raises(DataError, match="an id is there twice"):
        asked(twice)
    with pytest.raises(UsageError, match="there is no column ident"):
        asked(records, "ident")
    asked(records)
    with pytest.raises(UsageError, match="is there already"):
        match.ask(records, "patient", tmp_path / "kept2", tmp_path / "asked")
    with pytest.raises(DataError, match="is no file of this step"):
        match.answer(records, "patient", tmp_path / "records.csv", tmp_path / "mine", tmp_path / "answered")
    (tmp_path / "zeros").write_bytes(msgspec.msgpack.encode(match.Asked([bytes(32)])))
    with pytest.raises(DataError, match="made to cheat"):
        match.answer(records, "patient", tmp_path / "zeros", tmp_path / "mine", tmp_path / "answered")
    assert not (tmp_path / "mine").exists()
    match.answer(records, "patient", tmp_path / "asked", tmp_path / "mine", tmp_path / "answered")
    (tmp_path / "agreed").write_bytes(msgspec.msgpack.encode(match.Agreed(["t"], [7])))
    with pytest.raises(DataError, match="does not fit what is kept"):
        match.take(tmp_path / "mine", tmp_path / "agreed", tmp_path / "ids")
