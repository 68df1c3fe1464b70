"""The `confu` command: runs one command, turns errors into one sentence and an exit status.

Options are the fields of the config dataclasses, and their documentation is the help. Nothing heavy is imported before
a command runs. Exit status: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings

from cyclopts import CycloptsError

from confu.commands import bench, data, decode, formats, inspect, train, tune  # noqa: F401 (each registers its commands)
from confu.commands.app import INTERRUPTED, app, complain
from confu.models import ModelUnavailable

TERMINATED = 128 + signal.SIGTERM


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # what was begun (peers, files) is ended, too
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """One command; returns the exit status. Errors become one sentence on stderr."""
    debug = "--debug" in argv
    _settle_libraries(debug)
    try:
        status = app(argv, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except KeyboardInterrupt:
        if sys.stderr.isatty():  # the cursor may be behind ^C, or half a line
            print(file=sys.stderr)
        return complain("interrupted.", INTERRUPTED)
    except BrokenPipeError:  # whoever read has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _explain(error)
    return status or 0


def _explain(error: Exception) -> int:
    sentence = " ".join(str(error).split())
    if isinstance(error, (CycloptsError, ValueError, ModelUnavailable)):
        return complain(sentence, 2)
    if isinstance(error, (RuntimeError, OSError)) and sentence:
        return complain(str(error).strip().splitlines()[0], 1)
    return complain(f"unexpected {type(error).__name__}: {sentence} (--debug shows where).", 1)


def _settle_libraries(debug: bool) -> None:
    """Our own messages only; and output that no odd locale can make fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        logging.basicConfig(level=logging.INFO)
        logging.getLogger("confu").setLevel(logging.DEBUG)
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")
