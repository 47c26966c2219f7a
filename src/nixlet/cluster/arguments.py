"""A program's arguments, with what a person adds to them or puts in their place: k3s's ``--kube-apiserver-arg`` and its like."""

from collections.abc import Iterable, Mapping


def merged(ours: Mapping[str, str], extra: Iterable[str]) -> list[str]:
    """Arguments as ``--key=value``, sorted by key, so that the same settings give the same command line.

    Args:
        ours: Values by key, without dashes.
        extra: What was given, each taken in turn: ``key=value`` in place of ours (what is given twice is there twice: of a single value the
            later one counts, and lists grow), ``key+=value`` after ours, ``key-=value`` before ours, ``key`` alone for ``key=true``.
    """
    values = {key: [value] for key, value in ours.items()}
    #: What nobody has given yet: ours, which the first that is given puts away.
    untouched = set(values)
    for argument in extra:
        written, equals, value = argument.removeprefix("--").partition("=")
        key = written.rstrip("+-")
        if not equals:
            value = "true"
        there = values.get(key, [])
        if written.endswith("-"):
            there = [value, *there]
        elif written.endswith("+") or key not in untouched:
            there = [*there, value]
        else:
            there = [value]
        untouched.discard(key)
        values[key] = there
    return [f"--{key}={value}" for key in sorted(values) for value in values[key]]


def last(ours: Mapping[str, str], extra: Iterable[str]) -> dict[str, str]:
    """What counts of single values, by key: of those that ``merged`` gives, the last."""
    found = (argument.removeprefix("--").partition("=") for argument in merged(ours, extra))
    # In order, so that a later one takes the place of an earlier one.
    return {key: value for key, _, value in found}
