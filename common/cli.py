"""Command lines: numbers with a range, and errors that are one line."""

import argparse
import contextlib
import math
import multiprocessing
import os
import sys
from collections.abc import Callable

import torch
from tqdm import tqdm


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


def say(message: str) -> None:
    """One line on stderr, from process 0 alone; a progress bar gives way."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message, file=sys.stderr)


class Unbreakable:
    """A stream that may have no reader any more, as of a closed terminal: what cannot be written is
    lost, and the work goes on."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def command_line(main: Callable[[], int | None]) -> None:
    """Runs main() and exits with its code, or with one line and a code of ours: 2 for a mistake, 3
    for what is not finite, 130 for Ctrl-C. Anything else is an error of the program, with
    traceback.
    """
    sys.stderr = Unbreakable(sys.stderr)
    code = 1
    try:
        code = main()
    except KeyboardInterrupt:
        code = leave("stopped", 130)
    except FloatingPointError as error:
        code = leave(f"error: {error}", 3)
    except (ValueError, OSError) as error:
        code = leave(f"error: {error}", 2)
    except (RuntimeError, MemoryError) as error:
        reason = explain(error)
        if reason is None:
            raise
        code = leave(f"error: {reason}", 2)
    else:
        # Only here: after an error, NCCL would wait for what the other processes never send.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    finally:
        # A data loader's workers ignore SIGTERM, by which Python would end them.
        for worker in multiprocessing.active_children() if code else []:
            worker.kill()
    sys.exit(code)


def explain(error: Exception) -> str | None:
    """What a user can do about it; None if it is an error of the program."""
    line = str(error).partition("\n")[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in line:
        return "out of memory; take a smaller batch (in a training: --micro-batch)"
    if "DataLoader worker" in line or "with the workers" in line:  # killed; no files are left
        return f"a process that prepares images failed: {line}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile: {line}; or leave out --compile"
    return None


def leave(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code
