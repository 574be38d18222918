"""TOML into frozen settings; a key that does not exist gets the nearest one named."""

from __future__ import annotations

import difflib
import re
import tomllib
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from partway.errors import ConfigError, UsageError

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Positive = Annotated[int, Meta(ge=1, lt=2**31)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Rate = Annotated[float, Meta(gt=0, le=1000)]
ColumnName = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+$")]
Fingerprint = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The common parent: frozen, keyword-only, unknown keys refused."""


S = TypeVar("S", bound=Settings)


def said(of: Any) -> Any:
    """Settings without what is so by default, as plain data: a key that a later version brings changes nothing of it.

    >>> class Training(Settings, frozen=True, kw_only=True):
    ...     epochs: int
    ...     batch: int = 64
    >>> said(Training(epochs=20, batch=64)), said(Training(epochs=20, batch=32))
    ({'epochs': 20}, {'epochs': 20, 'batch': 32})
    """
    if isinstance(of, msgspec.Struct):
        own = [(field, getattr(of, field.name)) for field in msgspec.structs.fields(of)]
        return {field.name: said(value) for field, value in own if field.required or value != _default(field)}
    if isinstance(of, dict):
        return {key: said(value) for key, value in of.items()}
    return [said(value) for value in of] if isinstance(of, list | tuple) else of


def _default(field: Any) -> Any:
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def contents(path: Path, error: type[UsageError] = UsageError) -> bytes:
    """A file's bytes. Raises `error`, with the path and why."""
    try:
        return path.read_bytes()
    except OSError as failed:
        raise error(f"{path}: cannot be read ({failed.strerror})") from None


def read(text: str | bytes, kind: type[S], where: str) -> S:
    settings: S = converted(words_of(text, where), kind, where)
    return settings


def words_of(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text if isinstance(text, str) else text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not TOML: {error}") from None


def converted(words: Any, kind: Any, where: str) -> Any:
    _check_keys(words, kind, where, "")
    try:
        return msgspec.convert(words, kind)
    except msgspec.ValidationError as error:
        message = re.sub(r"`\$\.?([^`]*)`", r"`\1`", str(error))
        raise ConfigError(f"{where}: {message}") from None


def _check_keys(words: Any, kind: Any, where: str, section: str) -> None:
    """Names the nearest key for one that does not exist."""
    if not isinstance(words, dict):
        return
    kind = _kind_of(words, kind)
    if typing.get_origin(kind) is dict:
        for key, value in words.items():
            _check_keys(value, typing.get_args(kind)[1], where, f"{section} {key}")
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return
    fields = {f.encode_name: f.type for f in msgspec.structs.fields(kind)}
    for name in getattr(kind, "not_in_file", ()):
        del fields[name]
    if kind.__struct_config__.tag_field:
        fields[kind.__struct_config__.tag_field] = str
    for key, value in words.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            advice = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(fields)}"
            raise ConfigError(f"{where}: {section + ' ' if section else ''}has no key `{key}`; {advice}")
        _check_keys(value, fields[key], where, f"[{key}]" if not section else f"{section} {key}")


def _kind_of(words: dict[str, Any], kind: Any) -> Any:
    """A type without its bounds; of several structures, the one that the words' tag names."""
    while typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    options = [o for o in typing.get_args(kind) if isinstance(o, type) and issubclass(o, msgspec.Struct)]
    for option in options if typing.get_origin(kind) is not dict else []:
        tag = option.__struct_config__.tag_field
        if tag is None or words.get(tag) == option.__struct_config__.tag:
            return option
    return kind
