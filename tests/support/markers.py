"""Which tests start processes of their own: found in what they call, so that nobody has to remember a mark."""

from __future__ import annotations

from types import CodeType, FunctionType

STARTERS = {
    "DDPStrategy",
    "Popen",
    "Process",
    "Run",
    "check_failure_inside_on_one_of_two_ranks",
    "check_failure_outside_on_one_of_two_ranks",
    "check_resume",
    "check_two_ranks",
    "run_as_torchrun",
    "run_ranks",
    "subprocess",
}
"""Names that stand for processes wherever a test, or a function or fixture of its file, uses them."""


def starts_processes(item):
    """Tell whether a test, or a fixture or helper of its own file, uses one of :data:`STARTERS`."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    functions = [item.function, *(fixture.func for found in fixtures for fixture in found)]
    seen: set[CodeType] = set()
    return any(_uses_a_starter(function, seen) for function in functions)


def _uses_a_starter(function, seen):
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return False
    seen.add(function.__code__)
    names = _names(function.__code__)
    if names & STARTERS:
        return True
    module = function.__globals__
    helpers = (module[name] for name in names if name in module)
    beside = (
        helper for helper in helpers if getattr(helper, "__module__", "") == module["__name__"]
    )
    return any(_uses_a_starter(helper, seen) for helper in beside)


def _names(code):
    """Names in the code of a function and of the functions inside it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
