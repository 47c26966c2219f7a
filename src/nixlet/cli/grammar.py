"""What verbs are called with: the words for declaring options, arguments, verbs and groups of them.

These declarations are the one source for parsing (``parser``), and for help, usage errors and shell completion (``clickadapter``).
Each verb's stands beside the verb. Declaring imports nothing: all that a verb waits for before it runs is the reading of its module.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    Run = Callable[..., int | None]


class Option:
    """An option. Use one of the kinds below.

    Attributes:
        flags: How people write it: "--all", "-a".
        name: The keyword argument that the verb gets it as; by default its first flag of several letters.
        text: The help.
        metavar: What its value is called in the help; None: by its kind.
        default: Its value where nothing is said; a function is only called where that is so.
        default_text: What the help says of the default, where that is not the default itself.
        variable: The environment variable that is taken where no flag is given; an empty one is none.
        required: It must be given.
        hidden: The help has nothing of it.
        choices: The values that it may have; empty: any.
    """

    def __init__(
        self,
        *flags: str,
        name: str = "",
        text: str = "",
        metavar: str | None = None,
        default: "str | Callable[[], str] | None" = None,
        default_text: str = "",
        variable: str = "",
        required: bool = False,
        hidden: bool = False,
        choices: "Sequence[str]" = (),
    ) -> None:
        self.flags = flags
        self.name = name or next(flag for flag in flags if flag.startswith("--"))[2:].replace("-", "_")
        self.text = text
        self.metavar = metavar
        self.default = default
        self.default_text = default_text
        self.variable = variable
        self.required = required
        self.hidden = hidden
        self.choices = choices


class Flag(Option):
    """An option without a value: True when it is given."""


class Value(Option):
    """An option with a value, of which the last one counts: a text, None where there is no default."""


class Number(Option):
    """As ``Value``, a whole number of at most 18 digits without a sign: seconds, for one."""


class Values(Option):
    """An option that may be given several times: a tuple of texts."""


class Truth(Option):
    """An option whose value may be left out, and then is "true": ``--selinux`` is ``--selinux=true``."""


class Argument:
    """An argument.

    Attributes:
        name: The keyword argument that the verb gets it as; in capitals, what the help calls it.
        several: It takes all that is left, as a tuple; for a verb's last argument.
        required: It must be given; of several, one at least.
        default: Its value where it isn't given.
        choices: The values that it may have; empty: any.
        completes: What a shell completes it with: "containers", or empty.
    """

    def __init__(
        self,
        name: str,
        *,
        several: bool = False,
        required: bool = True,
        default: str | None = None,
        choices: "Sequence[str]" = (),
        completes: str = "",
    ) -> None:
        self.name = name
        self.several = several
        self.required = required and default is None
        self.default = default
        self.choices = choices
        self.completes = completes


class Verb:
    """What a person can have done.

    Attributes:
        run: Does it: called with a keyword argument for each option and argument; its result is the exit status, None is 0.
        text: The help.
        options: Its options, as the help lists them.
        arguments: Its arguments, in order.
        interspersed: Options may stand behind arguments; otherwise all from the first argument on is an argument.
        passes_unknown: Unknown options, also those for help, are arguments.
        foreign: Options that other tools have and this verb hasn't, and what to do instead.
    """

    def __init__(
        self,
        run: "Run",
        parameters: "Sequence[Option | Argument]",
        *,
        interspersed: bool = True,
        passes_unknown: bool = False,
        foreign: "Mapping[str, str] | None" = None,
    ) -> None:
        self.run = run
        self.text = run.__doc__ or ""
        self.options = [each for each in parameters if isinstance(each, Option)]
        self.arguments = [each for each in parameters if isinstance(each, Argument)]
        self.interspersed = interspersed
        self.passes_unknown = passes_unknown
        self.foreign = foreign or {}


class Group:
    """Verbs that belong together.

    Attributes:
        text: The help.
        verbs: The verbs by name.
    """

    def __init__(self, text: str, verbs: "Mapping[str, Verb]") -> None:
        self.text = text
        self.verbs = verbs


class Parsed:
    """A command line that is understood.

    Attributes:
        verb: The verb.
        values: What its function is called with.
        debug: ``nixlet --debug`` was said, or NIXLET_DEBUG.
        debug_flag: It was said by the flag.
    """

    def __init__(self, verb: Verb, values: "dict[str, Any]", *, debug: bool, debug_flag: bool) -> None:
        self.verb = verb
        self.values = values
        self.debug = debug
        self.debug_flag = debug_flag


def verb(
    *parameters: Option | Argument,
    interspersed: bool = True,
    passes_unknown: bool = False,
    foreign: "Mapping[str, str] | None" = None,
) -> "Callable[[Run], Verb]":
    """Declare a verb around the function that does it, whose docstring is the help; see ``Verb``."""

    def declare(run: "Run") -> Verb:
        return Verb(run, parameters, interspersed=interspersed, passes_unknown=passes_unknown, foreign=foreign)

    return declare
