"""The search for what a function captures."""

from collections import namedtuple
from functools import partial

from samx.core.captured import captured, replace_captured


class Kind:
    def __init__(self, number):
        self.number = number


Pair = namedtuple("Pair", "one two")
ONE, TWO = Kind(1), Kind(2)


def add_ten(x):
    return Kind(x.number + 10)


def numbers(fn):
    return replace_captured(fn, Kind, add_ten)()


def test_a_function_that_captures_nothing_is_the_same():
    count = 0

    def fn():
        return count

    assert captured(fn, Kind) == []
    assert replace_captured(fn, Kind, add_ten) is fn


def test_each_object_is_found_once():
    def fn(a=ONE, *, b=TWO):
        return [x.number for x in (a, b, ONE)]

    assert captured(fn, Kind) == [ONE, TWO]
    assert numbers(fn) == [11, 12, 11]
    assert fn() == [1, 2, 1]


def test_functions_that_refer_to_themselves_and_cells_that_are_empty():
    one = Kind(1)

    def countdown(n):
        return [one.number] * n if n < 2 else countdown(n - 1)

    assert replace_captured(countdown, Kind, add_ten)(3) == [11]

    def fn():
        return one.number, later

    found = replace_captured(fn, Kind, add_ten)
    later = 5
    assert found() == (11, 5)


def test_other_cells_are_shared():
    one, calls = Kind(1), 0

    def fn():
        nonlocal calls
        calls += 1
        return one.number

    assert numbers(fn) == 11
    assert calls == 1


def test_containers_keep_their_types():
    kept = Pair([ONE], {"a": (TWO, 3)})
    (one,), rest = replace_captured(partial(lambda x: x, kept), Kind, add_ten)()
    assert (one.number, rest["a"][0].number, rest["a"][1]) == (11, 12, 3)
    assert type(replace_captured(kept, Kind, add_ten)) is Pair
    assert kept.one == [ONE]


def test_globals_of_the_same_module_only():
    script = {"one": Kind(1)}
    exec("def g(): return one.number\ndef f(): return [g() for _ in 'a']", script)
    assert numbers(script["f"]) == [11]
    assert script["f"]() == [1]
    other = {"f": script["f"]}
    exec("def h(): return f()", other)
    assert captured(other["h"], Kind) == []
