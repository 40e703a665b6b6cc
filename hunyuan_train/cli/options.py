"""Options of a verb among its overrides. Free of torch."""

from collections.abc import Sequence

SELECTION = ("--from", "--until")
"""Of ``curriculum``: the stage to begin with, and the last one."""


def split_options(
    argv: Sequence[str], values: Sequence[str] = (), flags: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Return the options of ``argv`` by name, and everything else in order.

    Args:
        argv: Arguments of a verb.
        values: Options that take a value, as ``--name VALUE`` or ``--name=VALUE``.
        flags: Options without one; they are in the result, empty, if they are there.

    Raises:
        ValueError: an option has no value.
    """
    found: dict[str, str] = {}
    rest: list[str] = []
    waiting = iter(argv)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if argument in flags:
            found[argument] = ""
        elif name in values:
            found[name] = value if equals else next(waiting, "")
            if not found[name] or found[name].startswith("-"):
                raise ValueError(f"{name} needs a value, like {name} NAME")
        else:
            rest.append(argument)
    return found, rest
