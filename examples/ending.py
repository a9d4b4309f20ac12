"""How the program ends when something is wrong or it is told to. Importing it sets signal handlers."""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Ctrl-C, or a request to terminate."""

    def __init__(self, number: int):
        super().__init__()
        self.exit_code = 128 + number


def handle_signals(handler) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def at_once(number: int, _frame) -> NoReturn:
    os.write(1, b"\nstopped at once\n")  # print could be what was interrupted
    os._exit(128 + number)


def orderly(number: int, _frame) -> NoReturn:
    """Raises Stopped; a second signal does not wait for it."""
    handle_signals(at_once)
    raise Stopped(number)


def fail(message: str) -> NoReturn:
    """One line and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


handle_signals(at_once)  # importing torch takes seconds; there is nothing to put in order yet
