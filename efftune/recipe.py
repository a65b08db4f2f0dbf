"""The recipe language: `int8(group=64) + lora(r=16, target_modules="q_proj|v_proj") + lisa(layers=2)`.

Read with Python's own parser, literals only; nothing is evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing

from efftune.errors import EfftuneError
from efftune.linear.contracts import brief
from efftune.methods import available
from efftune.methods._base import Method


def parse(text: str) -> list[Method]:
    """The methods that `text` names, in its order.

    Raises: EfftuneError naming the method, the field, what was given and what would do.
    """
    return [_method(term, text) for term in _terms(_tree(text))]


def format_recipe(methods: list[Method]) -> str:
    """The recipe that `parse` reads back as these methods. A setting that is no literal is written as "..."."""
    return " + ".join(brief(method, method.name, _literal).removesuffix("()") for method in methods)


def _literal(value) -> str:
    text = repr(value)
    try:
        same = bool(ast.literal_eval(text) == value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        same = False
    return text if same else "..."


def terms(text: str) -> list[str]:
    """The terms of a recipe in an order of their own, that of two recipes to be compared."""
    return sorted(ast.unparse(term) for term in _terms(_tree(text)))


def unnamed(methods: list[Method]) -> list[Method]:
    """Those of the methods that their recipe, as text, does not give back: made of a class that is not found by its
    name, or with a setting that the recipe language cannot write."""
    return [method for method in methods if not _comes_back(method)]


def _comes_back(method: Method) -> bool:
    try:
        (found,) = parse(format_recipe([method]))
    except Exception:  # whatever the annotations of somebody's class raise: what was trained is saved all the same
        return False
    return type(found) is type(method) and _settings(found) == _settings(method)


def _settings(method: Method) -> list:
    values = [getattr(method, field.name) for field in dataclasses.fields(method)]
    return [tuple(value) if isinstance(value, list) else value for value in values]  # as `parse` has them


def method_class(name: str) -> type[Method]:
    """The class of the method `name`.

    Raises: EfftuneError with the nearest name and all others, where there is none.
    """
    methods = available()
    if name not in methods:
        raise EfftuneError(
            f"There is no method {name!r}{nearest(name, methods)}; the methods are: {', '.join(methods)}."
        )
    return methods[name]


def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise EfftuneError(
            f"recipe {text!r} does not parse ({error.msg}); write for example 'int8 + lora(r=16)'."
        ) from None


def _terms(tree: ast.expr) -> list[ast.expr]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        return [*_terms(tree.left), *_terms(tree.right)]
    return [tree]


def _method(term: ast.expr, text: str) -> Method:
    call = term if isinstance(term, ast.Call) else ast.Call(term, [], [])
    if not isinstance(call.func, ast.Name):
        raise EfftuneError(
            f"recipe {text!r}: {ast.unparse(term)!r} is no method; write for example 'int8 + lora(r=16)'."
        )
    name = call.func.id
    cls = method_class(name)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if call.args:
        raise EfftuneError(f"{name} takes its settings by name: {', '.join(f'{f}=...' for f in fields)}.")
    settings = {}
    for keyword in call.keywords:
        field = keyword.arg
        if field not in fields:
            raise EfftuneError(f"{name} has no setting {field!r}{nearest(field, fields)}; it has: {', '.join(fields)}.")
        if field in settings:
            raise EfftuneError(f"{name}: {field} is given twice.")
        try:
            value = ast.literal_eval(keyword.value)
        except (ValueError, TypeError):
            raise EfftuneError(f"{name}: {field}={ast.unparse(keyword.value)} is not a literal.") from None
        settings[field] = _typed(name, field, value, typing.get_type_hints(cls)[field])
    return cls(**settings)


def _typed(method: str, field: str, value, hint):
    """value as the annotation wants it: lists become tuples (methods are hashable), an int will do for a float."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list):
        value = tuple(value)
    kinds = tuple(typing.get_origin(kind) or kind for kind in allowed)
    if type(value) in kinds and not (isinstance(value, tuple) and not all(isinstance(v, str) for v in value)):
        return value
    if type(value) is int and float in kinds:
        return float(value)
    wanted = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
    raise EfftuneError(f"{method}: {field} is {wanted}, not {value!r}.")


def nearest(name: str | None, known) -> str:
    """ " (did you mean ...?)", or nothing where no known name is near."""
    close = difflib.get_close_matches(name or "", known, 1, 0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
