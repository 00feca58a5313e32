"""How every command ends that cannot go on: with a line that says what is wrong, and exit status 1."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exits(command: str, interrupted: str = "interrupted.") -> Iterator[None]:
    """Turns errors of the user's input and Ctrl-C into a message.

    Args:
        command: name of the command, for the message.
        interrupted: what it says on Ctrl-C.
    """
    try:
        yield
    except (FloatingPointError, ImportError, OSError, ValueError) as error:
        sys.exit(f"spikebert {command}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nspikebert {command}: {interrupted}")
