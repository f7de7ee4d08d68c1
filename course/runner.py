"""Runs the graded tests, in a clean copy of the project that has a student's file in it. The grader
starts this as a process of its own:

    python -m course.runner MODULE SECONDS TEST ...        the first line of stdin is a word

and reads what it writes to stdout, a line [word, test, ""] for a test that passed, [word, test, why
not] for one that failed; and [word, "", ""] before them, once the student's file is imported.
"""

import faulthandler
import importlib
import json
import os
import sys
import traceback

import torch

MEMORY = 12 * 2**30  # bytes of addresses; torch alone takes some GB of them
FILE_SIZE = 2**26  # bytes
CPU_SECONDS = 900  # also ends what a test has left running, should the grader not find it


def limit_resources() -> None:
    """As far as the platform allows: Windows has no limits, macOS not all of them, and a lower
    limit may be set already."""
    try:
        import resource
    except ImportError:
        return
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: FILE_SIZE,
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        try:
            hard = resource.getrlimit(kind)[1]
            if hard != resource.RLIM_INFINITY:
                limit = min(limit, hard)
            resource.setrlimit(kind, (limit, hard))
        except (ValueError, OSError):
            pass


def describe(error: BaseException) -> str:
    """The error in its own words, and where in the student's file it happened."""
    reason = f"{type(error).__name__}: {error}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if os.path.dirname(frame.filename) == os.getcwd():
            reason += f"\n{os.path.basename(frame.filename)}, line {frame.lineno}: {frame.line}"
            break
    return reason[:2000]


def main() -> None:
    limit_resources()
    word = sys.stdin.readline().strip()
    module_name, seconds, *tests = sys.argv[1:]
    # What the student's code prints goes to stderr, and is no result.
    results = os.dup(1)
    os.dup2(2, 1)

    def report(test: str, reason: str) -> None:
        line = json.dumps([word, test, reason]) + "\n"
        os.write(results, line.encode())

    # After this time a test's process says where it is, and ends.
    faulthandler.dump_traceback_later(int(seconds), exit=True)
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # also SystemExit
        for test in tests:
            report(test, describe(error))
        return
    report("", "")

    for test in tests:
        faulthandler.dump_traceback_later(int(seconds), exit=True)
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        reason = ""
        try:
            getattr(module, test)()
        except BaseException as error:
            reason = describe(error)
        report(test, reason)


if __name__ == "__main__":
    main()
