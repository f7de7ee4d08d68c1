"""Devices, and the processes that torchrun starts, one for each GPU."""

import datetime
import hashlib
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or mps -> the device; auto takes the fastest. Raises ValueError if it is not
    there."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        name = available[0]
    if name not in available:
        raise ValueError(f"--device {name}: not available here; there is {', '.join(available)}")
    return torch.device(name)


class Processes(NamedTuple):
    """The processes that work together, seen from one of them: its device, its number, how many."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def all_reduce(self, value: Tensor, operation: str = "SUM") -> Tensor:
        """The SUM, MAX or MIN of value over all processes, on value's device."""
        if self.world == 1:
            return value
        total = value.detach().to(self.device, copy=True)
        dist.all_reduce(total, getattr(dist.ReduceOp, operation))
        return total.to(value.device)

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.all_reduce(torch.zeros(1))

    def first_alone(self, action: Callable):
        """action(), first in process 0, then in the others, which find what it has written. If it
        fails there with ValueError or OSError, all processes end."""
        error = None
        result = None
        if self.rank == 0:
            try:
                result = action()
            except (ValueError, OSError) as caught:
                error = caught
        failed = self.all_reduce(torch.tensor(float(error is not None)), "MAX")
        if error is not None:
            raise error
        if failed:
            raise SystemExit(2)
        if self.rank > 0:
            result = action()
        return result

    def refuse_if_different(self, **values) -> None:
        """Raises ValueError in all processes if one has another value: it sees other folders."""
        for name, value in values.items():
            digest = hashlib.sha256(repr(value).encode()).hexdigest()
            number = torch.tensor(int(digest[:12], 16), dtype=torch.float64)
            if self.all_reduce(number, "MIN") != self.all_reduce(number, "MAX"):
                raise ValueError(
                    f"process {self.rank} has {name} = {value!r:.80}, another process has another: "
                    "all must see the same --data and --out"
                )


def start_processes(device_name: str) -> Processes:
    """Joins torchrun's processes, if there are any; each takes a GPU of its own. Raises
    ValueError."""
    device = pick_device(device_name)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Processes(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Hours, not NCCL's ten minutes: while one process lists a large folder or saves, others wait.
    patience = datetime.timedelta(hours=12)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=patience)
    except (ValueError, RuntimeError) as error:  # a port in use, a host that is not found
        reason = str(error).partition("\n")[0]
        raise ValueError(f"WORLD_SIZE is set, as torchrun does, but {reason}") from None
    return Processes(device, dist.get_rank(), dist.get_world_size())
