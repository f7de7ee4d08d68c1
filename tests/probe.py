"""Runs a script as `python script ...` does. With KILL_AT=n it kills itself, SIGKILL, at its n-th
call of os.fsync or os.replace, of which saving consists; with START_METHOD=spawn its worker
processes start as they do on a Mac and on Windows; with SLOW_SAVE=n each save takes n seconds."""

import multiprocessing
import os
import runpy
import signal
import sys
import time


def kill_at(moment: int) -> None:
    calls = 0

    def killing(function):
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    os.fsync = killing(os.fsync)
    os.replace = killing(os.replace)


def save_slowly(seconds: float) -> None:
    fsync = os.fsync

    def slow(file):
        time.sleep(seconds)
        fsync(file)

    os.fsync = slow


if __name__ == "__main__":  # a spawned worker imports this file too, under another name
    if "KILL_AT" in os.environ:
        kill_at(int(os.environ["KILL_AT"]))
    if "SLOW_SAVE" in os.environ:
        save_slowly(float(os.environ["SLOW_SAVE"]))
    if "START_METHOD" in os.environ:
        multiprocessing.set_start_method(os.environ["START_METHOD"])
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
