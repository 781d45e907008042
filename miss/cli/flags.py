"""Flags of a command out of its dataclass: through tyro, or, where that is not installed, through argparse.

Knows dataclasses and flags; does not know any command. A GPU machine that installs nothing has no tyro: there every
command but `finetune` and `pretrain`, whose flags are a whole configuration, reads the same flags in the same words.
"""

import argparse
import ast
import dataclasses
import importlib.util
import inspect
import textwrap
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union

Positional: Any
Append: Any
if importlib.util.find_spec("tyro") is not None:
    from tyro.conf import Positional, UseAppendAction

    Append = UseAppendAction
else:
    Positional, Append = "positional", "append"


def parse(args_type: Any, argv: list[str], prog: str, default: Any = None) -> Any:
    """Flags as an instance of the dataclass; usage errors leave by SystemExit(2).

    Raises:
        ModuleNotFoundError: a flag is of a kind that only tyro reads, and tyro is not installed.
    """
    if importlib.util.find_spec("tyro") is not None:
        import tyro

        extra = {} if default is None else {"default": default}
        return tyro.cli(args_type, args=argv, prog=prog, **extra)
    return plain(args_type, argv, prog, default)


def plain(args_type: Any, argv: list[str], prog: str, default: Any = None) -> Any:
    """The same through argparse alone."""
    parser = argparse.ArgumentParser(prog=prog, description=inspect.getdoc(args_type), allow_abbrev=False)
    hints, helps = typing.get_type_hints(args_type, include_extras=True), _helps(args_type)
    for field in dataclasses.fields(args_type):
        value = _default(field) if default is None else getattr(default, field.name)
        _add(parser, field.name, hints[field.name], value, helps.get(field.name, ""))
    found = vars(parser.parse_args(argv))
    for field in dataclasses.fields(args_type):
        if isinstance(found[field.name], list) and typing.get_origin(_bare(hints[field.name])[0]) is tuple:
            found[field.name] = tuple(found[field.name])
    return args_type(**found)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _add(parser: argparse.ArgumentParser, name: str, hint: Any, value: Any, text: str) -> None:
    kind, marks = _bare(hint)
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if Positional in marks:
        parser.add_argument(name, type=kind, **options)
        return
    if value is dataclasses.MISSING:
        options["required"] = True
    else:
        options["default"] = value
    origin = typing.get_origin(kind)
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif origin in (tuple, list):
        options |= _scalar(typing.get_args(kind)[0]) | ({"action": "append"} if Append in marks else {"nargs": "*"})
    else:
        options |= _scalar(kind)
    parser.add_argument("--" + name.replace("_", "-"), dest=name, **options)


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(the type without Annotated and None, the marks)."""
    marks: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *rest = typing.get_args(hint)
        marks = tuple(rest)
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [one for one in typing.get_args(hint) if one is not type(None)]
        hint = inner[0] if len(inner) == 1 else hint
    return hint, marks


def _scalar(kind: Any) -> dict[str, Any]:
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return {"choices": choices, "type": type(choices[0])}
    if kind in (str, int, float, Path):
        return {"type": kind}
    raise ModuleNotFoundError(f"a flag of {kind} needs tyro", name="tyro")


def _helps(args_type: Any) -> dict[str, str]:
    """The string below each field."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(args_type))).body[0]
    except (OSError, TypeError):
        return {}
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(after.value.value).split())
    return found
