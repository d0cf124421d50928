"""Messages of jsonargparse and of constructors, cut to the one line that helps.

The wording of jsonargparse may change between versions: where no pattern matches, the first line that says
something remains.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from lightning_sgd.cli.settings import Setting

KEY = re.compile(r'Parser key "([^"]+)":\s*')
CLASS_PROBLEM = re.compile(r"Problem with given class_path '(?:[^']+\.)?([^'.]+)':\s*(.+)")
NO_SUBCLASS = re.compile(r"Import path.* does not correspond to a subclass of (\w+)")
REQUIRED = re.compile(r"the following arguments are required: (.+)")
EXPECTED = re.compile(r"Expected an? (?:<class '([^']+)'>|typing\.Literal\[(.+)\])")
GIVEN = re.compile(r"(?:Given|Got) value: (.+)")
EMPTY = re.compile(r"[\s-]*(Does not validate|Subtypes:|Errors:|Expected a path|Given value|$)")
HOUSE_FORM = re.compile(r"Expected `[^`]+` to be ")
CHECKED_PACKAGES = ("torch.optim.", "lightning.")


def one_line(message: str, settings: Sequence[Setting], command: str) -> str:
    r"""Cut a message of jsonargparse to its essence.

    Args:
        message: The message, of any number of lines.
        settings: What the user gave, to name the place of a value.
        command: The command that was given.

    Example:
        >>> one_line('Parser key "seed":\n  Expected a <class \'int\'>. Got value: x', [], "fit")
        "invalid value 'x' for 'seed': expected int"
    """
    keys = list(KEY.finditer(message))
    if keys:
        option = keys[-1][1].removeprefix(f"{command}.")
        detail = message[keys[-1].end() :]  # of nested messages only the innermost tells the cause
    else:
        option, detail = "", message
    return (
        _missing_arguments(detail, option, command)
        or _refused_value(detail, option, settings)
        or _first_telling_line(detail, option)
    )


def _missing_arguments(message: str, option: str, command: str) -> str | None:
    required = REQUIRED.search(message)
    if required is None:
        return None
    prefix = f"{option}." if option else ""
    names = [f"'--{prefix}{name.removeprefix(f'{command}.')}'" for name in required[1].split(", ")]
    problem = CLASS_PROBLEM.search(message)
    needed_by = f"{problem[1]} needs" if problem else f"`lightning-sgd {command}` needs"
    return f"{needed_by} {' and '.join(names)}"


def _refused_value(message: str, option: str, settings: Sequence[Setting]) -> str | None:
    given = GIVEN.search(message)
    if given is None:
        return None
    place = _place(option, given[1], settings)
    if base := NO_SUBCLASS.search(message):
        return f"invalid value '{given[1]}' for {place}: it is no subclass of {base[1]}"
    expected = [text for found in EXPECTED.findall(message[: given.start()]) for text in found]
    wanted = dict.fromkeys(text.replace("NoneType", "null") for text in expected if text)
    if not set(wanted) - {"null"}:
        return None
    return f"invalid value '{given[1]}' for {place}: expected {' or '.join(wanted)}"


def told_by_constructor(error: BaseException) -> str | None:
    """Extract what a constructor says about a setting, if a traceback would add nothing.

    That holds for the checks of this package, of Lightning and of torch's optimizers; ``None`` stands for errors in
    the code of the user.

    Args:
        error: What was raised; of nested objects, jsonargparse wraps it.
    """
    while error.__cause__ is not None and not HOUSE_FORM.match(str(error)):
        error = error.__cause__
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    origin = frames[-1].f_globals.get("__name__", "") if frames else ""
    checked = isinstance(error, ValueError) and origin.startswith(CHECKED_PACKAGES)
    if checked or HOUSE_FORM.match(str(error)) or isinstance(error, MisconfigurationException):
        return " ".join(str(error).split())
    return None


def _place(option: str, value: str, settings: Sequence[Setting]) -> str:
    """Name the setting that holds ``value``, by its full name if it can be found."""
    last = option.rpartition(".")[2]
    for setting in settings:
        if setting.path[-1] == last and str(setting.value) == value:
            return str(setting)
    return f"'{option}'"


def _first_telling_line(message: str, option: str) -> str:
    lines = message.splitlines()
    telling = next((line.strip(" -") for line in lines if not EMPTY.match(line)), "")
    telling = telling or "these settings are not valid"
    return f"'{option}': {telling}" if option else telling
