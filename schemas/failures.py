"""The ways a command can fail, one class per exit code.

A failure is the user's to mend, so it is one line: what was found, what was expected, what to run. Anything that is not
a `Failure` is a bug and keeps its traceback.

    Failure
    ├── UsageFailure       2   a flag, a TOML key or a combination of them
    │   └── StaleFailure   2   finished, but with other settings or inputs than asked for
    ├── InputFailure       3   the data or the model given is not fit for the stage
    ├── IntegrityFailure   4   a file of the run is missing, changed or of another version
    ├── LockedFailure      5   another process works on this stage
    ├── ResourceFailure    6   disk or memory
    ├── DivergedFailure    7   the loss is not finite
    └── InterruptedFailure 75  stopped by a signal; the same command resumes (EX_TEMPFAIL)

Names and values from outside stand in these lines: what a terminal would take for a new line or a command is escaped.
"""

LONGEST = 2000  # characters of a line


class Failure(Exception):
    """A failure whose message is meant for the user: one line, whatever stands in it."""

    exit_code = 1

    def __str__(self) -> str:
        return on_one_line(super().__str__())


def on_one_line(text: str) -> str:
    """Text as a terminal can show it: what is not printable is escaped, and the middle of what is too long left out."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 4 :]}"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class UsageFailure(Failure):
    """The command line or the settings file asks for something impossible."""

    exit_code = 2


class StaleFailure(UsageFailure):
    """The stage is finished, but with other settings or inputs: it must not be replaced unasked."""


class InputFailure(Failure):
    """The data or the model given cannot be used."""

    exit_code = 3


class IntegrityFailure(Failure):
    """A file of the run is not what its manifest says."""

    exit_code = 4


class LockedFailure(Failure):
    """Another process holds the stage."""

    exit_code = 5


class ResourceFailure(Failure):
    """The disk is full or memory ran out."""

    exit_code = 6


class DivergedFailure(Failure):
    """Training met a loss that is not finite."""

    exit_code = 7


class InterruptedFailure(Failure):
    """A signal stopped the stage at a point from which it can resume."""

    exit_code = 75
