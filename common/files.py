"""Files that are whole or not there, and long work on files that survives a kill."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.distributed import Processes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Calls write(PATH.tmp), flushes that to the disk and renames it to path, which therefore is
    whole or what it was before. Raises OSError naming the file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise OSError(f"{path}: cannot be written ({error}); nothing was replaced") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


LOCKS = []  # files that are open as long as the process lives


def lock_folder(folder: Path) -> None:
    """Makes the folder this process's own until it ends. Raises ValueError if it is another's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: no folder, and none can be made ({error.strerror})") from None
    if fcntl is None or any(file.name == str(folder / "lock") for file in LOCKS):
        return
    file = open(folder / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{folder}: another process trains there; take another --out") from None
    except OSError:  # a file system without locks
        pass
    LOCKS.append(file)


# Work on many images is cut into chunks. Each is a file of its own in a folder, numbers count them,
# and a chunk is done when its file is there. So a stopped command finds what it has done before;
# processes need not talk to each other; and nobody writes into another's file, which network disks
# would not survive. At the end the chunks are joined to one file.


def fill_chunks(
    folder: Path,
    settings: dict,
    num_chunks: int,
    compute: Callable[[int], dict[str, np.ndarray]],
    processes: Processes,
    description: str,
) -> None:
    """Computes and saves the chunks 0 ... num_chunks - 1 that are not in the folder yet, shared
    among the processes. settings: what chunks depend on, words and numbers. Raises ValueError if
    the folder's are others, naming them."""
    processes.first_alone(lambda: check_settings(folder, settings))
    mine = range(processes.rank, num_chunks, processes.world)
    missing = [chunk for chunk in mine if not chunk_path(folder, chunk).exists()]
    quiet = processes.rank > 0 or not missing
    for chunk in tqdm(missing, desc=description, unit="chunk", disable=quiet):
        save = functools.partial(save_npz, arrays=compute(chunk))
        write_atomically(chunk_path(folder, chunk), save)
    processes.barrier()


def chunk_path(folder: Path, chunk: int) -> Path:
    return folder / f"chunk-{chunk}.npz"


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # by name, numpy would add an ending
        np.savez(file, **arrays)


def check_settings(folder: Path, settings: dict) -> None:
    """Creates the folder with its settings. Raises ValueError if it holds results of
    others."""
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.exists():
        try:
            before = json.loads(path.read_text())
            changed = [name for name in settings if settings[name] != before.get(name)]
        except (ValueError, AttributeError):
            raise ValueError(f"{path}: damaged; remove {folder}") from None
        if not changed:
            return
        results = [file for file in folder.iterdir() if file.suffix in (".npz", ".npy")]
        if results:  # chunks, or what they were joined to; without any, nothing can be lost
            name = changed[0]
            raise ValueError(
                f"{folder}: half done with another {name} ({before.get(name)}, now "
                f"{settings[name]}); finish that, remove it, or choose another name"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: exists already, and is no half-done work of this command")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_chunks(folder: Path, num_chunks: int, name: str) -> Iterable[np.ndarray]:
    """The array of this name of each chunk, one after another."""
    for chunk in range(num_chunks):
        with np.load(chunk_path(folder, chunk)) as arrays:
            yield arrays[name]


def write_npy(file, count: int, parts: Iterable[np.ndarray]) -> None:
    """Writes the parts, which have count rows together, to an open file as one .npy, without ever
    holding more than one of them in memory."""
    header_is_missing = True
    for part in parts:
        if header_is_missing:
            description = np.lib.format.dtype_to_descr(part.dtype)
            shape = (count, *part.shape[1:])
            header = {"descr": description, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            header_is_missing = False
        file.write(np.ascontiguousarray(part).tobytes())


def fingerprint(models: list[nn.Module]) -> str:
    """SHA-256 of the models' configs and weights, in hexadecimal: what their output depends on."""
    digest = hashlib.sha256()
    for model in models:
        digest.update(str(model.config).encode())
        for weight in model.state_dict().values():
            digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
