"""Long work that survives a kill (common.files.fill_chunks): any number of processes, stopped at
any moment, make the same files as one that was left in peace."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import AR, GLOO_ABORTS, ROOT, call, environment, log, run
from PIL import Image

import train_ar
from common import files
from common.distributed import Processes
from common.files import chunk_path, fill_chunks, fingerprint, write_atomically
from common.training import ImageData, Samples, draw_shape

ALONE = Processes(torch.device("cpu"))
COUNT = 6  # chunks


def squares(chunk: int) -> dict[str, np.ndarray]:
    return {"squares": np.arange(10 * chunk, 10 * chunk + 10) ** 2}


def fill(folder: Path, compute=squares, processes: Processes = ALONE, **settings) -> None:
    fill_chunks(folder, settings or {"a": 1}, COUNT, compute, processes, "squares")


def contents(folder: Path) -> list[np.ndarray]:
    return list(files.read_chunks(folder, COUNT, "squares"))


@pytest.fixture
def whole(tmp_path) -> list[np.ndarray]:
    fill(tmp_path / "whole")
    return contents(tmp_path / "whole")


# Which process kills itself, at which chunk, and in which of the two calls of a save.
PROGRAM = """
import os, signal, sys
import numpy as np
import torch
from common.distributed import start_processes
from common.files import fill_chunks

folder, rank, chunk, call = sys.argv[1:]
rank, chunk = int(rank), int(chunk)
processes = start_processes("cpu")

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def squares(i):
    if (processes.rank, i) == (rank, chunk):
        setattr(os, call, kill)
    return {"squares": np.arange(10 * i, 10 * i + 10) ** 2}

fill_chunks(__import__("pathlib").Path(folder), {"a": 1}, 6, squares, processes, "squares")
"""


@pytest.mark.slow
def test_any_processes_complete_what_a_killed_one_left(tmp_path, whole):
    folder = tmp_path / "chunks"
    words = [sys.executable, "-c", PROGRAM, folder]
    options = dict(env=environment(PYTHONPATH=ROOT), capture_output=True, text=True)

    done = subprocess.run([*words, "0", "2", "replace"], **options)
    assert done.returncode == -signal.SIGKILL
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["chunk-0.npz", "chunk-1.npz", "chunk-2.npz.tmp", "settings.json"]
    first = chunk_path(folder, 0).stat().st_mtime_ns

    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for processes, killed in [(2, ("1", "3")), (4, ("-1", "-1"))]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc_per_node={processes}", program, folder, *killed, "fsync"]
        for _ in range(3):
            done = subprocess.run(launch, **options)
            if GLOO_ABORTS not in done.stderr:
                break
        assert (done.returncode == 0) == (killed[0] == "-1"), done.stderr[-2000:]
        assert chunk_path(folder, 3).exists() == (killed[0] == "-1")
    assert all(np.array_equal(a, b) for a, b in zip(contents(folder), whole, strict=True))
    assert chunk_path(folder, 0).stat().st_mtime_ns == first  # not done again
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_chunks(tmp_path, whole, monkeypatch, world):
    """Without their meeting, which would take real ones (above)."""
    monkeypatch.setattr(Processes, "all_reduce", lambda self, value, operation="SUM": value)
    computed = []
    for rank in reversed(range(world)):
        processes = Processes(torch.device("cpu"), rank, world)
        fill(tmp_path / "c", lambda chunk: computed.append(chunk) or squares(chunk), processes)
    assert sorted(computed) == list(range(COUNT))
    assert all(np.array_equal(a, b) for a, b in zip(contents(tmp_path / "c"), whole, strict=True))


def test_what_is_done_is_not_done_again(tmp_path):
    fill(tmp_path / "c")
    chunk_path(tmp_path / "c", 3).unlink()
    computed = []
    fill(tmp_path / "c", lambda chunk: computed.append(chunk) or squares(chunk))
    assert computed == [3]


def test_other_settings_are_refused(tmp_path):
    fill(tmp_path / "c", a=1, b=[2, 3])
    fill(tmp_path / "c", a=1, b=[2, 3])
    with pytest.raises(ValueError, match=r"c: half done with another b \(\[2, 3\], now 4\)"):
        fill(tmp_path / "c", a=1, b=4)
    with pytest.raises(ValueError, match="half done with another c"):
        fill(tmp_path / "c", a=1, c=4)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{'a': 1}"])
def test_damaged_settings_are_named(tmp_path, text):
    fill(tmp_path / "c")
    (tmp_path / "c" / "settings.json").write_text(text)
    with pytest.raises(ValueError, match="settings.json: damaged; remove"):
        fill(tmp_path / "c")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(ValueError, match="exists already, and is no half-done work"):
        fill(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_full_disk_loses_no_chunk(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def large(chunk: int) -> dict[str, np.ndarray]:
        if chunk == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        return squares(chunk)

    try:
        with pytest.raises(OSError, match="chunk-2.npz: cannot be written"):
            fill(tmp_path / "c", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["chunk-0.npz", "chunk-1.npz", "settings.json"]
    fill(tmp_path / "c")
    assert len(contents(tmp_path / "c")) == COUNT


def test_a_file_is_whole_or_what_it_was(tmp_path):
    path = tmp_path / "x"
    path.write_text("before")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        assert path.read_text() == "before"
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with pytest.raises(OSError, match="x: cannot be written .PytorchStreamWriter.*nothing was"):
        write_atomically(path, write)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]
    write_atomically(path, lambda temporary: temporary.write_text("after"))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["after"]


def test_fingerprint_follows_weights_and_config(make_ar):
    other = make_ar()
    with torch.no_grad():
        other.norm.weight[3] += 1e-6
    prints = [fingerprint([model]) for model in (make_ar(), other, make_ar(dropout=0.3))]
    assert fingerprint([make_ar()]) == prints[0]
    assert len(set(prints)) == 3


# Tokenizing: chunks, joined to one file at the end


@pytest.fixture
def images(tmp_path, monkeypatch) -> ImageData:
    """120 images in three chunks, of which number 60 cannot be read."""
    monkeypatch.setattr(train_ar, "CHUNK", 48)
    for i in range(120):
        folder = tmp_path / "data" / str(i // 61)  # the next one has another class
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (2 * i, 255 - i, 90)).save(folder / f"{i:03}.png")
    (tmp_path / "data" / "0" / "060.png").write_bytes(b"no picture")
    return ImageData(str(tmp_path / "data"), 16)


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    small = dict(num_tokens=8, num_groups=4, encoder_layers=1, decoder_layers=1)
    return make_tokenizer(image_size=16, **small)


def tokenize(tokenizer, images, folder) -> tuple[np.ndarray, np.ndarray]:
    train_ar.map_file.cache_clear()
    return train_ar.tokenize(tokenizer, images, folder, False, ALONE)


def test_tokenizing_stopped_at_any_moment(tokenizer, images, tmp_path, monkeypatch):
    """After each of the renames and removals of files that it consists of."""
    codes, sources = tokenize(tokenizer, images, tmp_path / "whole")
    assert codes.shape == (120, 2, 8)
    assert len(np.unique(codes)) > 10
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "codes.npy",
        "settings.json",
        "sources.npy",
    ]

    class Stopped(BaseException):
        pass

    left = [1]  # calls until it stops

    def stopping(function):
        def counted(*args, **kwargs):
            result = function(*args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                raise Stopped
            return result

        return counted

    monkeypatch.setattr(os, "replace", stopping(os.replace))
    monkeypatch.setattr(Path, "unlink", stopping(Path.unlink))
    stops = 0
    while True:
        left[0] = 1 + stops % 2
        try:
            found, again = tokenize(tokenizer, images, tmp_path / "torn")
            break
        except Stopped:
            stops += 1
    assert stops == 6
    assert np.array_equal(found, codes)
    assert np.array_equal(again, sources)
    assert len(list((tmp_path / "torn").iterdir())) == 3


def test_the_next_image_takes_a_corrupt_ones_place(tokenizer, images, tmp_path, capsys):
    codes, sources = tokenize(tokenizer, images, tmp_path / "codes")
    assert "060.png" in capsys.readouterr().err
    assert sources[60] == 61
    assert np.array_equal(np.delete(sources, 60), np.delete(np.arange(120), 60))
    assert np.array_equal(codes[60], codes[61])

    # As on the fly: the label is the picture's, and the file is counted.
    stored = train_ar.CodeSamples(tmp_path / "codes", images, seed=0)
    crop = train_ar.functools.partial(train_ar.one_crop, size=16)
    pictures = Samples(images, crop, seed=0)
    corrupt = 0
    for position in range(120):
        tokens, *rest = stored[position]
        picture, *expected = pictures[position]
        assert rest == expected
        corrupt += rest[-1]
        if position % 20 == 0 or rest[-1]:
            assert torch.equal(tokens, tokenizer.encode(train_ar.to_float(picture[None]))[0])
    assert corrupt == 1


def test_codes_of_another_tokenizer_or_data_are_refused(tokenizer, make_tokenizer, tmp_path):
    folder = tmp_path / "codes"
    images = ImageData("shapes", 16)
    images.labels = images.labels[:10]
    tokenize(tokenizer, images, folder)
    with pytest.raises(ValueError, match="codes: half done with another tokenizer"):
        tokenize(make_tokenizer(image_size=16), images, folder)
    images.digest = "others"
    with pytest.raises(ValueError, match="codes: half done with another data"):
        tokenize(tokenizer, images, folder)


@pytest.mark.parametrize("name", ["codes.npy", "sources.npy"])
@pytest.mark.parametrize("kept", [0, 100, 300])
def test_cut_codes_are_named(tokenizer, tmp_path, name, kept):
    folder = tmp_path / "codes"
    images = ImageData("shapes", 16)
    images.labels = images.labels[:100]
    tokenize(tokenizer, images, folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:kept])
    with pytest.raises(ValueError, match="codes: damaged codes .*remove the folder"):
        tokenize(tokenizer, images, folder)


@pytest.mark.slow
def test_killed_tokenizing_goes_on_with_two_processes(work):
    for i in range(4 * train_ar.CHUNK):
        folder = work / "many" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        draw_shape(i, 16).save(folder / f"{i}.png")
    words = [*AR, *"--data many --tokenizer tokenizer/last.pt --steps 3 --out".split()]
    call(*words, "codes-whole", cwd=work)
    # The settings and the empty log take two calls each, then each chunk two.
    run(*words, "codes-torn", cwd=work, probe=True, KILL_AT=8, code=-signal.SIGKILL)
    assert (work / "codes-torn" / "codes" / "chunk-0.npz").exists()
    assert not (work / "codes-torn" / "codes" / "chunk-2.npz").exists()
    run(*words, "codes-torn", cwd=work, processes=2)
    whole, torn = (work / name / "codes" for name in ("codes-whole", "codes-torn"))
    for name in ("codes.npy", "sources.npy"):
        assert (whole / name).read_bytes() == (torn / name).read_bytes()
    for a, b in zip(log(whole.parent), log(torn.parent), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
