"""The number of threads: tried, unless the user or the run says it. No processor is asked here."""

import pytest
import torch
from command_lines import BASELINE, call

import dar
from common import threads
from common.threads import Threads

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """A machine with 8 threads. machine.seconds: what a product takes, by the number of threads."""

    class Machine:
        number = 8
        seconds = {8: 1.0, 4: 2.0, 2: 4.0, 1: 8.0}
        time = 1000.0
        said = []
        looks = 0

    def set_num_threads(number: int) -> None:
        Machine.number = number

    def time_product(x, weight) -> float:
        Machine.looks += Machine.number == 1
        return Machine.seconds[Machine.number]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "ALL", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: Machine.number)
    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
    monkeypatch.setattr(threads, "time_product", time_product)
    monkeypatch.setattr(threads.time, "monotonic", lambda: Machine.time)
    monkeypatch.setattr(threads, "say", Machine.said.append)
    return Machine


@pytest.mark.parametrize(
    "seconds, expected",
    [
        ({8: 1.0, 4: 2.0, 2: 4.0, 1: 8.0}, 8),
        ({8: 20.0, 4: 10.0, 2: 5.0, 1: 2.0}, 1),
        ({8: 20.0, 4: 1.0, 2: 2.0, 1: 4.0}, 4),
        ({8: 1.1, 4: 1.0, 2: 1.0, 1: 1.0}, 8),  # no reason to change
    ],
)
def test_takes_what_is_clearly_faster(machine, seconds, expected):
    machine.seconds = seconds
    Threads(None, CPU).start(width=64)
    assert machine.number == expected
    assert len(machine.said) == (expected != 8)
    if expected != 8:
        assert machine.said[0].startswith(f"threads: {expected} of 8, faster now")


def test_two_bad_rounds_decide_nothing(machine, monkeypatch):
    of_8_threads = [100.0, 0.5, 100.0, 0.5, 0.5]
    times = iter([time for slow in of_8_threads for time in (slow, 1.0, 1.0, 1.0)])
    monkeypatch.setattr(threads, "time_product", lambda *_: next(times))
    Threads(None, CPU).start(width=64)
    assert machine.number == 8


def test_users_number_rules(machine, monkeypatch):
    machine.seconds = {8: 20.0, 4: 10.0, 2: 5.0, 1: 2.0}
    chosen = Threads(3, CPU)
    chosen.start(width=64, saved=2)
    machine.time += 100
    chosen.look_again()
    assert machine.number == 3
    machine.number = 8
    Threads(None, torch.device("cuda")).start(width=64)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    Threads(None, CPU).start(width=64, saved=2)
    assert machine.number == 8
    assert machine.looks == 0
    assert machine.said == []


def test_looks_again_every_so_often(machine):
    chosen = Threads(None, CPU)
    chosen.start(width=64)
    machine.seconds = {8: 20.0, 4: 10.0, 2: 5.0, 1: 2.0}
    machine.time += 1
    chosen.look_again()
    assert machine.number == 8
    machine.time += 2
    chosen.look_again()
    chosen.look_again()
    assert machine.number == 1
    assert machine.looks == 2 * 5  # of five rounds
    machine.time += 3
    chosen.look_again()  # 4 seconds after the second, then 8, 16, and every 20
    assert machine.looks == 2 * 5
    machine.seconds = {8: 1.0, 4: 2.0, 2: 4.0, 1: 8.0}
    machine.time += 21
    chosen.look_again()
    assert machine.number == 8
    assert [line[:18] for line in machine.said] == ["threads: 1 of 8, f", "threads: 8 of 8, f"]


def test_compiled_code_keeps_its_number(machine):
    chosen = Threads(None, CPU, again=False)
    chosen.start(width=64)
    machine.seconds = {8: 20.0, 4: 10.0, 2: 5.0, 1: 2.0}
    machine.time += 100
    chosen.look_again()
    assert machine.number == 8


def test_stopped_run_goes_on_with_its_number(machine):
    chosen = Threads(None, CPU)
    chosen.start(width=64, saved=2)
    assert machine.number == 2
    assert machine.looks == 0
    assert machine.said == [
        "threads: 2 of 8, as this run was saved with; --threads N decides otherwise"
    ]
    Threads(None, CPU).start(width=64, saved=16)  # of a larger machine
    assert machine.number == 8


def test_training_saves_its_number_and_takes_it_again(tmp_path, work, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "ALL", 2)
    tried = []
    monkeypatch.setattr(
        threads, "try_numbers", lambda numbers, width: tried.append(numbers) or {2: 2.0, 1: 1.0}
    )
    words = [*BASELINE, "--out", tmp_path / "run"]
    call(*words, "--threads", 2, cwd=work)
    path = tmp_path / "run" / "last.pt"
    assert dar.read_checkpoint(path)["training"]["threads"] == 2

    try:
        call(*words, "--steps", 5, cwd=work)
        assert torch.get_num_threads() == 2
        assert tried == []
        checkpoint = dar.read_checkpoint(path)
        del checkpoint["training"]["threads"]  # as an older release wrote it
        torch.save(checkpoint, tmp_path / "old.pt")
        (tmp_path / "old.pt").replace(path)
        call(*words, "--steps", 6, cwd=work)
        assert tried == [[2, 1]]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_product_is_timed(monkeypatch):
    numbers = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    seconds = threads.try_numbers([2, 1], width=8)
    assert numbers == [2, 1] * 5
    assert seconds.keys() == {2, 1}
    assert all(0 < value < 1 for value in seconds.values())
