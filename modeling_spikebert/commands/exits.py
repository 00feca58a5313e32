"""How everything ends that cannot go on: with one line that says what is wrong, and exit status 1."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exits(program: str, interrupted: str = "interrupted.") -> Iterator[None]:
    """Turns errors of the user's input and Ctrl-C into a message.

    Args:
        program: what was called, for the message.
        interrupted: what it says on Ctrl-C.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if was_interrupted(error):
            sys.exit(f"\n{program}: {interrupted}")
        if isinstance(error, FloatingPointError | ImportError | OSError | ValueError):
            sys.exit(f"{program}: {one_line(error)}")
        from huggingface_hub.errors import StrictDataclassError  # only now: `spikebert --help` does not wait for it

        if isinstance(error, StrictDataclassError):
            sys.exit(f"{program}: the config of the model is not valid: {one_line(error.__cause__ or error)}")
        raise


def was_interrupted(error: BaseException | None) -> bool:
    """By Ctrl-C, also if something else failed then, as a pool of processes does."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or was_interrupted(error.__context__))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
