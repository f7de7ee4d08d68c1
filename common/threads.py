"""How many threads torch uses on a CPU. Threads that wait for each other spin: beside another busy
program, two of them can be ten times as slow as one. So the numbers are tried, and the fastest
taken."""

import os
import statistics
import time

import torch
import torch.nn.functional as F

from common.cli import integer, say

ALL = torch.get_num_threads()
MARGIN = 1.2  # another number is taken only if it is so many times as fast
PATIENCE = 20  # seconds before the next look; at first 2, lest a wrong one last


def add_threads_option(add, default: str = "the fastest number, tried") -> None:
    """add: a parser's add_argument."""
    about = f"of the CPU, for each process (default: {default})"
    add("--threads", type=integer(1, 1024), help=about)


class Threads:
    """The user's number of threads, --threads or OMP_NUM_THREADS, for good; or on a CPU the one
    that is fastest whenever it looks. again=False: it looks only at the start, for torch.compile
    makes code for one number."""

    def __init__(self, wanted: int | None, device: torch.device, again: bool = True):
        self.fixed = wanted is not None or "OMP_NUM_THREADS" in os.environ or device.type != "cpu"
        self.again = again
        self.next_look = 0.0
        self.patience = 2
        if wanted is not None:
            torch.set_num_threads(wanted)

    def start(self, width: int = 512, saved: int | None = None) -> None:
        """Takes the number that a stopped run was saved with, or looks for the fastest. width: of
        the model, for products of the size that it has."""
        self.width = width
        if self.fixed:
            return
        if saved is None or saved > ALL:
            self.look()
        else:
            self.take(saved, "as this run was saved with")
            self.patience = PATIENCE
        self.next_look = time.monotonic() + self.patience

    def look_again(self) -> None:
        """Before a step: looks, if the last time is long enough ago."""
        if self.fixed or not self.again or time.monotonic() < self.next_look:
            return
        self.look()
        self.patience = min(2 * self.patience, PATIENCE)
        self.next_look = time.monotonic() + self.patience

    def look(self) -> None:
        before = torch.get_num_threads()
        seconds = try_numbers(numbers_to_try(), self.width)
        torch.set_num_threads(before)
        fastest = min(seconds, key=seconds.get)
        if before in seconds and seconds[before] < MARGIN * seconds[fastest]:
            fastest = before
        why = "faster now, perhaps because another program is busy"
        if fastest > before:
            why = "faster now"
        self.take(fastest, why)

    def take(self, number: int, why: str) -> None:
        if number != torch.get_num_threads():
            say(f"threads: {number} of {ALL}, {why}; --threads N decides otherwise")
        torch.set_num_threads(number)


def numbers_to_try() -> list[int]:
    """All threads, half of them, a quarter, ... one."""
    numbers = [ALL]
    while numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    return numbers


def try_numbers(numbers: list[int], width: int) -> dict[int, float]:
    """Seconds of a small product and a GELU with each of these numbers of threads."""
    if len(numbers) == 1:
        return {numbers[0]: 1.0}
    x = torch.ones(256, width)
    weight = torch.ones(4 * width, width)
    rounds = {number: [] for number in numbers}
    for _ in range(5):  # in turn, so that what comes and goes meets all of them
        for number in numbers:
            torch.set_num_threads(number)
            rounds[number].append(time_product(x, weight))
    return {number: statistics.median(times) for number, times in rounds.items()}


@torch.no_grad()
def time_product(x: torch.Tensor, weight: torch.Tensor, at_least: float = 0.005) -> float:
    """Seconds of one of those that are done in 5 ms or a little more. The mean, for the slow ones
    count: that some are fast helps nobody."""
    F.gelu(F.linear(x, weight))  # starts the threads
    started = time.perf_counter()
    count = 0
    while time.perf_counter() - started < at_least:
        F.gelu(F.linear(x, weight))
        count += 1
    return (time.perf_counter() - started) / count
