"""Command lines: numbers with a range, and errors that are one line."""

import argparse
import math
import multiprocessing
import sys
from collections.abc import Callable

import torch


def integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """For argparse's type=: an integer from minimum to maximum."""

    def parse(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is no whole number") from None
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{value}: expected {minimum} ... {maximum}")
        return value

    return parse


def real(minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """For argparse's type=: a finite number from minimum to maximum."""

    def parse(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is no number") from None
        if not minimum <= value <= maximum or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{value:g}: expected {minimum:g} ... {maximum:g}")
        return value

    return parse


def command_line(main: Callable[[], int | None]) -> None:
    """Runs main() and exits with its code, or with one line and a code of ours: 2 for a mistake, 3
    for what is not finite, 130 for Ctrl-C. Anything else is an error of the program, with
    traceback.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        code = leave("stopped", 130)
    except FloatingPointError as error:
        code = leave(f"error: {error}", 3)
    except (ValueError, OSError) as error:
        code = leave(f"error: {error}", 2)
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).splitlines()[0]
        code = leave(f"error: torch.compile: {reason}; or leave out --compile", 2)
    else:
        # Only here: after an error, NCCL would wait for what the other processes never send.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    sys.exit(code)


def leave(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    for worker in multiprocessing.active_children():  # of a data loader; they ignore SIGTERM
        worker.kill()
    return code
