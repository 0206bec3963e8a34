"""Find the objects that a function captures, and make the same function with others in their place.

A function captures what its closure cells, its defaults and the globals that it names hold, and
what the functions among these capture in turn. Global functions are searched if they are of the
same module. Tuples, lists, dicts, `functools.partial` and bound methods are looked into.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any


def captured(fn: Any, kinds: Any) -> list[Any]:
    """Return the objects of these types that a function captures, each once."""
    return list({id(x): x for x in _objects(fn, kinds, set())}.values())


def replace_captured(fn: Any, kinds: Any, replace: Callable[[Any], Any]) -> Any:
    """Return the function with `replace(x)` for each object x of these types that it captures.

    Only what holds such an object is copied. Neither the function nor the objects change.
    """
    return _replaced(fn, kinds, replace, {})


def _objects(x: Any, kinds: Any, seen: set[int]) -> Iterator[Any]:
    """Yield the objects in `x`, which is a function or anything else."""
    if isinstance(x, kinds):
        yield x
    elif id(x) not in seen:
        seen.add(id(x))
        for part in _parts(x):
            yield from _objects(part, kinds, seen)


def _parts(x: Any) -> list[Any]:
    """Return what a function or a container holds."""
    if isinstance(x, FunctionType):
        kept = [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
        return [cell.cell_contents for cell in _filled(x)] + kept + list(_globals(x).values())
    if isinstance(x, MethodType):
        return [x.__self__, x.__func__]
    if isinstance(x, partial):
        return [x.func, *x.args, *x.keywords.values()]
    if isinstance(x, dict):
        return list(x.values())
    return list(x) if isinstance(x, tuple | list) else []


def _filled(fn: FunctionType) -> list[CellType]:
    """Return the closure cells of a function that hold something by now."""
    cells = []
    for cell in fn.__closure__ or ():
        try:
            cell.cell_contents  # noqa: B018
        except ValueError:
            continue
        cells.append(cell)
    return cells


def _globals(fn: FunctionType) -> dict[str, Any]:
    """Return the globals that a function names, without the functions of other modules."""
    found = {name: fn.__globals__[name] for name in _names(fn.__code__) if name in fn.__globals__}
    return {
        name: x
        for name, x in found.items()
        if not isinstance(x, FunctionType) or x.__globals__ is fn.__globals__
    }


def _names(code: CodeType) -> set[str]:
    inner = [_names(const) for const in code.co_consts if isinstance(const, CodeType)]
    return {*code.co_names}.union(*inner)


def _replaced(x: Any, kinds: Any, replace: Callable[[Any], Any], done: dict[int, Any]) -> Any:
    if isinstance(x, kinds):
        return replace(x)
    if id(x) in done:
        return done[id(x)]
    if not captured(x, kinds):
        return x
    again = partial(_replaced, kinds=kinds, replace=replace, done=done)
    if isinstance(x, FunctionType):
        return _replaced_function(x, kinds, again, done)
    if isinstance(x, MethodType):
        return MethodType(again(x.__func__), again(x.__self__))
    if isinstance(x, partial):
        keywords = {key: again(value) for key, value in x.keywords.items()}
        return partial(again(x.func), *map(again, x.args), **keywords)
    if isinstance(x, dict):
        copy = x.copy()
        copy.update({key: again(value) for key, value in x.items()})
        return copy
    parts = [again(part) for part in x]
    return x._make(parts) if hasattr(x, "_make") else type(x)(parts)


def _replaced_function(
    fn: FunctionType, kinds: Any, again: Callable[[Any], Any], done: dict[int, Any]
) -> FunctionType:
    """Return a copy of a function; cells that hold no such object are shared with it."""
    holding = [cell for cell in _filled(fn) if captured(cell.cell_contents, kinds)]
    cells = {id(cell): CellType() for cell in holding}
    globals_, named = fn.__globals__, _globals(fn)
    if captured(list(named.values()), kinds):
        globals_ = {**globals_}
    closure = tuple(cells.get(id(cell), cell) for cell in fn.__closure__ or ())
    copy = FunctionType(fn.__code__, globals_, fn.__name__, None, closure or None)
    done[id(fn)] = copy  # before its parts, since a function may refer to itself
    for cell in holding:
        cells[id(cell)].cell_contents = again(cell.cell_contents)
    if globals_ is not fn.__globals__:
        globals_.update({name: again(value) for name, value in named.items()})
    copy.__defaults__ = fn.__defaults__ and tuple(map(again, fn.__defaults__))
    defaults = fn.__kwdefaults__
    copy.__kwdefaults__ = defaults and {name: again(value) for name, value in defaults.items()}
    copy.__dict__.update(fn.__dict__)
    return copy
