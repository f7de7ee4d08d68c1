"""sample.py: pictures, layout control, and sets that come out the same whoever draws them, however often they die."""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

import dar
import sample

ROOT = Path(dar.__file__).parent
FORK = multiprocessing.get_context("forkserver")  # real processes that need not import torch anew each time
FORK.set_forkserver_preload(["torch", "torch.distributed", "numpy", "PIL.Image", "tqdm", "pytest"])


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_ar, make_tokenizer) -> Path:
    """A Llama's checkpoint with its tokenizer: 32 tokens in 8 groups, 32 pixels, ten classes named c0 ... c9."""
    ar = make_ar()
    ar.attach_tokenizer(make_tokenizer())
    ar.class_names = [f"c{i}" for i in range(10)]
    path = tmp_path_factory.mktemp("model") / "ar.pt"
    dar.save_checkpoint(path, ar)
    return path


@pytest.fixture(scope="module")
def ar(model) -> dar.ARTransformer:
    ar = dar.load_ar(model)  # with packed weights, as the script's: they round otherwise than plain ones
    return dar.prepare_for_sampling(ar)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, and leaves torch's threads as they were."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def call(*words, code=None) -> None:
    """sample.py's command line in this process; checks its exit code."""
    with patch.object(sys, "argv", ["sample.py", *"--device cpu --dtype float32".split(), *map(str, words)]):
        with pytest.raises(SystemExit) as ended:
            dar.command_line(sample.main)
    assert ended.value.code == code


def work(rank: int, world: int, port: int, words: tuple) -> None:
    """One of several processes, as torchrun starts them; what it says goes to a log beside the test's folder."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background, deaf to it
    os.dup2(os.open(log_file(), os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["sample.py", *"--device cpu --dtype float32".split(), *map(str, words)]
    dar.command_line(sample.main)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def log_file() -> Path:
    return Path.cwd().with_suffix(".log")


def start(world: int, *words) -> list[multiprocessing.Process]:
    port = free_port()
    processes = [FORK.Process(target=work, args=(rank, world, port, words)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def finish(processes) -> list[int]:
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def marks(part: Path) -> int:
    """How many batches of a set are done."""
    return (part / "done").read_bytes().count(1) if (part / "done").exists() else 0


def pixels(images: torch.Tensor) -> np.ndarray:
    return dar.to_uint8(images).permute(0, 2, 3, 1).numpy()


def images_of(grid: Image.Image, columns: int, count: int) -> np.ndarray:
    """The 32x32 pictures of a labelled grid, which shows them three times as large."""
    found = []
    for i in range(count):
        x, y = i % columns * 100 + 2, i // columns * 114 + 2
        found.append(np.asarray(grid.convert("RGB"))[y : y + 96 : 3, x : x + 96 : 3])
    return np.stack(found)


# Sets


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """A set of 44 pictures in 11 batches, drawn by one process in one go."""
    file = tmp_path_factory.mktemp("whole") / "whole.npz"
    call("--ckpt", model, "--num", 44, "--batch", 4, "--npz", file)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("world", [3])  # 2 below
def test_any_number_of_processes_writes_the_same_bytes(model, whole, world):
    assert finish(start(world, "--ckpt", model, "--num", 44, "--batch", 4, "--npz", "x.npz")) == [0] * world
    assert Path("x.npz").read_bytes() == whole.read_bytes()
    assert os.listdir() == ["x.npz"]


@pytest.mark.slow
def test_torchrun_and_its_threads_change_nothing(model, whole):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    words = ["--", ROOT / "sample.py", "--ckpt", model, "--num", 44, "--batch", 4, "--npz", "x.npz"]
    words += "--device cpu --dtype float32".split()
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([*torchrun, *map(str, words)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path("x.npz").read_bytes() == whole.read_bytes()
    assert done.stderr.count("44/44") <= 2 and done.stdout.count("44 pictures") == 1  # one bar, one last line


@pytest.mark.slow
def test_a_set_killed_at_random_moments_by_1_2_3_processes_comes_out_the_same(model, whole):
    rng, words, part = (
        random.Random(),
        ("--ckpt", model, "--num", 44, "--batch", 4, "--npz", "x.npz"),
        Path("x.npz.part"),
    )
    finished = []
    for world in rng.sample((1, 2, 3), 3):
        before = marks(part)
        processes = start(world, *words)
        while marks(part) <= before and not Path("x.npz").exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))  # anywhere within a batch
        for process in rng.sample(processes, world):
            process.kill()
        assert -signal.SIGKILL in finish(processes), "the set was complete before it was killed"
        finished.append(marks(part))
    assert 0 < finished[0] < finished[1] < finished[2] < 11
    assert finish(start(2, *words)) == [0, 0]
    assert Path("x.npz").read_bytes() == whole.read_bytes() and not part.exists()


def test_what_is_finished_is_not_drawn_again(model, whole):
    words = ("--ckpt", model, "--num", 44, "--batch", 4, "--npz", "x.npz")
    interrupted(words, after=3)
    part = Path("x.npz.part")
    drawn = np.load(part / "0.npy", "r+")
    assert marks(part) == 3
    assert np.array_equal(drawn[:12], np.load(whole)["arr_0"][:12])  # what Ctrl-C leaves is usable
    drawn[5] = 77
    drawn.flush()
    call(*words)
    expected = np.load(whole)["arr_0"]
    expected[5] = 77
    assert np.array_equal(np.load("x.npz")["arr_0"], expected)


def interrupted(words, after: int) -> None:
    """Runs a command that gets Ctrl-C in the batch that follows `after` others."""
    real, batches = dar.stream, itertools.count()

    def stream(*args, **kwargs):
        if next(batches) == after:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with patch.object(dar, "stream", stream):
        call(*words, code=130)


def test_ctrl_c_says_how_much_is_done(model):
    words = ("--ckpt", model, "--num", 800, "--batch", 4, "--npz", "x.npz")
    (process,) = start(1, *words)
    while marks(Path("x.npz.part")) < 2:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    assert finish([process]) == [130]
    assert f"{4 * marks(Path('x.npz.part'))} of 800 pictures are done" in log_file().read_text()


@pytest.mark.parametrize("words, compiled", [((), False), (("--compile",), True)])
def test_loaded_models_are_prepared_once(model, words, compiled):
    calls = []
    load, prepare = dar.load_ar, dar.prepare_for_sampling
    with (
        patch.object(dar, "load_ar", lambda *args, **kwargs: (calls.append("load"), load(*args, **kwargs))[1]),
        patch.object(dar, "prepare_for_sampling", lambda *what: (calls.append(what[1]), prepare(what[0]))[1]),
    ):
        call("--ckpt", model, "--num", 1, *words)
    assert calls[:2] == ["load", compiled] and calls.count("load") == 1


def test_no_generator_is_left_half_way_where_ctrl_c_would_be_lost(model):
    """Python drops what is raised while it clears away a generator: one Ctrl-C in 200 once did nothing."""
    real, ended = dar.stream, []

    def stream(*args, **kwargs):
        yield from real(*args, **kwargs)
        ended.append(True)

    with patch.object(dar, "stream", stream):
        call("--ckpt", model, "--num", 4, "--batch", 2)
        call("--ckpt", model, "--num", 4, "--batch", 2, "--tokens", 32, "--npz", "x.npz")
    assert ended == [True] * 4


def test_a_set_holds_the_pictures_of_its_seeds_and_their_classes(model, ar):
    call("--ckpt", model, "--num", 6, "--batch", 3, "--seed", 7, "--balanced", "--classes", "c4", 2, "--npz", "x.npz")
    archive = np.load("x.npz", allow_pickle=False)
    assert archive["arr_1"].tolist() == [4, 2, 4, 2, 4, 2]
    for seeds, labels in (([7, 8, 9], [4, 2, 4]), ([10, 11, 12], [2, 4, 2])):
        *_, step = dar.stream(ar, ar.tokenizer, torch.tensor(labels), (4.0, 4.0), seeds)
        assert np.array_equal(archive["arr_0"][seeds[0] - 7 : seeds[-1] - 6], pixels(step.x))


def test_classes_at_random_belong_to_the_seed(model):
    call("--ckpt", model, "--num", 8, "--batch", 1, "--npz", "x.npz")
    call("--ckpt", model, "--num", 3, "--batch", 1, "--npz", "y.npz", "--seed", 5)
    x, y = np.load("x.npz"), np.load("y.npz")
    assert np.array_equal(x["arr_1"][5:], y["arr_1"]) and np.array_equal(x["arr_0"][5:], y["arr_0"])
    call("--ckpt", model, "--num", 200, "--tokens", 4, "--steps", 1, "--batch", 200, "--npz", "z.npz")
    assert set(np.load("z.npz")["arr_1"]) == set(range(10))


def test_a_folder_holds_the_same_pictures_in_the_same_order_and_resumes(model, whole):
    words = ("--ckpt", model, "--num", 44, "--batch", 4, "--folder", "x")
    interrupted(words, after=5)
    assert len(os.listdir("x")) == 20
    call(*words)
    names, archive = sorted(os.listdir("x")), np.load(whole)
    assert [int(name[:2]) for name in names] == list(range(44))
    assert [int(Path(name).stem[3:]) for name in names] == archive["arr_1"].tolist()
    found = np.stack([np.asarray(Image.open(Path("x", name))) for name in names])
    assert np.array_equal(found, archive["arr_0"])
    assert os.listdir() == ["x"]


def test_other_settings_do_not_continue_a_set(model, capsys):
    words = ("--ckpt", model, "--num", 12, "--batch", 4, "--npz", "x.npz")
    interrupted(words, after=1)
    for other, said in ((("--seed", 5), "seed was 0, is 5"), (("--cfg", "none"), "cfg was 4.0, is None")):
        capsys.readouterr()
        call(*words, *other, code=2)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error and "steps" not in error
    call(*words)


def test_other_weights_do_not_continue_a_set(model, capsys, make_ar, make_tokenizer):
    words = ("--num", 12, "--batch", 4, "--npz", "x.npz")
    interrupted(("--ckpt", model, *words), after=1)
    other = make_ar(seed=2)
    other.attach_tokenizer(make_tokenizer())
    dar.save_checkpoint("other.pt", other)
    capsys.readouterr()
    call("--ckpt", "other.pt", *words, code=2)
    assert "weights was" in capsys.readouterr().err
    shutil.copy(model, "moved.pt")
    call("--ckpt", "moved.pt", *words)  # the same weights elsewhere


def test_a_set_in_which_nothing_is_finished_is_begun_anew(model):
    words = ("--ckpt", model, "--num", 8, "--batch", 4, "--npz", "x.npz")
    call(*words, "--temperature", -1, code=2)
    assert Path("x.npz.part").exists()
    call(*words)
    assert len(np.load("x.npz")["arr_0"]) == 8


def test_a_finished_set_is_not_overwritten(model, capsys):
    Path("x.npz").write_bytes(b"precious")
    call("--ckpt", model, "--num", 4, "--npz", "x.npz", code=2)
    assert "x.npz: exists already" in capsys.readouterr().err and Path("x.npz").read_bytes() == b"precious"


def test_the_disk_must_have_room_for_twice_the_set(model, capsys, monkeypatch):
    size = 6 * 32 * 32 * 3
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size - 1))
    call("--ckpt", model, "--num", 6, "--npz", "x.npz", code=2)
    assert "GB of disk" in capsys.readouterr().err and os.listdir() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size))
    call("--ckpt", model, "--num", 6, "--npz", "x.npz")


@pytest.mark.slow
def test_one_refusal_for_all_processes(model):
    Path("x.npz").write_bytes(b"")
    assert finish(start(2, "--ckpt", model, "--npz", "x.npz")) == [2, 2]
    said = log_file().read_text()
    assert said.count("error:") == said.count("error: x.npz: exists already") == 1 and "Trace" not in said


@pytest.mark.parametrize("threads", [1, 2])
def test_the_script_sets_the_threads(model, threads):
    torch.set_num_threads(3)
    call("--ckpt", model, "--num", 1, "--npz", "x.npz", *(("--threads", 2) if threads == 2 else ()))
    assert torch.get_num_threads() == threads


# Reconstruction


def test_reconstructions_and_their_originals(model, ar, capsys):
    folder = Path("photos", "deep")
    folder.mkdir(parents=True)
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (70 + i, 90, 3), np.uint8)).save(folder / f"{i}.png")
    call("--ckpt", model, "--reconstruct", "photos", "--npz", "x.npz", "--reference-npz", "y.npz", "--batch", 2)
    ours, theirs = np.load("x.npz")["arr_0"], np.load("y.npz")["arr_0"]
    crops = [np.asarray(dar.center_crop(Image.open(folder / f"{i}.png"), 32)) for i in range(5)]
    assert np.array_equal(theirs, np.stack(crops))
    originals = dar.to_float(torch.from_numpy(theirs).permute(0, 3, 1, 2))
    for which in (slice(0, 2), slice(2, 4), slice(4, 5)):
        noise = dar.initial_noise(list(range(5))[which], 32, torch.device("cpu"))
        assert np.array_equal(ours[which], pixels(ar.tokenizer.decode(ar.tokenizer.encode(originals[which]), noise)))
    expected = 10 * np.log10(255**2 / ((ours - theirs.astype(float)) ** 2).mean((1, 2, 3))).mean()
    assert f"PSNR {expected:.2f} dB" in capsys.readouterr().out
    assert np.load("x.npz").files == ["arr_0"]


# Pictures


def drawn(ar, labels, seeds, **settings) -> list[dar.StreamStep]:
    return list(dar.stream(ar, ar.tokenizer, torch.tensor(labels), (4.0, 4.0), seeds, **settings))


def test_a_trajectory_shows_each_preview_and_the_result(model, ar):
    call("--ckpt", model, "--num", 2, "--trajectory", "t.png", "--out", "x.png", "--threads", 1)
    torch.set_num_threads(1)
    steps = drawn(ar, [0, 1], [0, 1])
    expected = torch.stack([*(step.preview for step in steps), steps[-1].x], 1).flatten(0, 1)
    assert np.array_equal(images_of(Image.open("t.png"), 9, 18), pixels(expected))
    assert np.array_equal(images_of(Image.open("x.png"), 2, 2), pixels(steps[-1].x))


def test_without_a_name_the_trajectory_takes_the_grids_place(model):
    call("--ckpt", model, "--num", 2, "--trajectory", "--gif", "--out", "x.png")
    assert Image.open("x.png").size == (900, 228) and sorted(os.listdir()) == ["x.gif", "x.png"]


def test_the_animation_runs_through_the_previews_to_the_result(model, ar):
    call("--ckpt", model, "--num", 2, "--gif", "x.gif", "--out", "x.png", "--threads", 1)
    torch.set_num_threads(1)
    steps, film = drawn(ar, [0, 1], [0, 1]), Image.open("x.gif")
    assert film.n_frames == 9
    for k, images in enumerate([*(step.preview for step in steps), steps[-1].x]):
        film.seek(k)
        difference = images_of(film, 2, 2).astype(float) - pixels(images)
        assert np.abs(difference).mean() < 8  # 256 colours


@pytest.mark.parametrize("tokens", [4, 16, 32])
def test_tokens_shows_the_partial_decoding(model, ar, tokens):
    call("--ckpt", model, "--num", 2, "--tokens", tokens, "--out", "x.png", "--threads", 1)
    torch.set_num_threads(1)
    codes = drawn(ar, [0, 1], [0, 1])[-1].codes[:, :tokens]
    expected = ar.tokenizer.decode(codes, dar.initial_noise([0, 1], 32, torch.device("cpu")))
    assert np.array_equal(images_of(Image.open("x.png"), 2, 2), pixels(expected))


def test_partial_tokens_are_all_that_is_drawn(model, ar):
    lengths = []
    real = dar.generate_groups

    def groups(*args, **kwargs):
        for codes in real(*args, **kwargs):
            lengths.append(codes.shape[1])
            yield codes

    with patch.object(dar, "generate_groups", groups):
        call("--ckpt", model, "--num", 1, "--tokens", 12, "--out", "x.png")
    assert sum(lengths) == 12


def test_a_layout_grid_keeps_the_tokens_of_an_image(model, ar):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8))
    photo.save("photo.png")
    words = ("--ckpt", model, "--threads", 1, "--prefix-image", "photo.png", "--classes", "c3", 7, "--seed", 20)
    call(*words, "--prefix-tokens", 0, 6, 32, "--out", "x.png", "--batch", 2)
    torch.set_num_threads(1)
    grid = images_of(Image.open("x.png"), 3, 9).reshape(3, 3, 32, 32, 3)
    crop = np.asarray(dar.center_crop(photo, 32))
    codes = ar.tokenizer.encode(dar.to_float(torch.from_numpy(crop.copy()).permute(2, 0, 1)[None]))[0]
    for row, kept in zip(grid, (0, 6, 32)):
        assert np.array_equal(row[0], crop)
        step = drawn(ar, [3, 7], [20, 21], prefix=codes[:kept])[-1]
        assert torch.equal(step.codes[:, :kept], codes[:kept].expand(2, -1))
        assert np.array_equal(row[1:], pixels(step.x))


def test_a_layout_may_come_from_a_drawn_picture_and_fits_its_number_of_tokens(model, ar):
    call(
        "--ckpt", model, "--threads", 1, "--prefix-seed", 9, "--prefix-class", "c1", "--classes", "c3", "--out", "x.png"
    )
    torch.set_num_threads(1)
    grid = images_of(Image.open("x.png"), 2, 8)
    source = drawn(ar, [1], [9])[-1]
    assert Image.open("x.png").size == (200, 4 * 114)
    for i, kept in enumerate((4, 8, 12, 16)):  # 1/8, 1/4, 3/8, 1/2 of 32
        assert np.array_equal(grid[2 * i], pixels(source.x)[0])
        assert np.array_equal(grid[2 * i + 1], pixels(drawn(ar, [3], [0], prefix=source.codes[0, :kept])[-1].x)[0])


def test_a_prefix_is_run_in_one_pass(model, ar):
    lengths = []
    real = dar.ARTransformer.run

    def run(self, x, *caches):
        lengths.append(x.shape[1])
        return real(self, x, *caches)

    Image.new("RGB", (32, 32), "red").save("red.png")
    with patch.object(dar.ARTransformer, "run", run):
        call("--ckpt", model, "--prefix-image", "red.png", "--prefix-tokens", 10, "--classes", 1, "--out", "x.png")
    assert lengths == [11] + [1] * 21


def test_ctrl_c_leaves_a_picture_of_the_finished_batches(model, ar):
    interrupted(("--ckpt", model, "--num", 6, "--batch", 2, "--out", "x.png", "--threads", 1), after=2)
    torch.set_num_threads(1)
    expected = torch.cat([drawn(ar, labels, labels)[-1].x for labels in ([0, 1], [2, 3])])
    assert np.array_equal(images_of(Image.open("x.png"), 6, 4), pixels(expected))


def test_ctrl_c_before_anything_is_finished_writes_nothing(model):
    interrupted(("--ckpt", model, "--num", 6, "--batch", 2, "--out", "x.png"), after=0)
    assert os.listdir() == []


MISTAKES = {
    "an archive as folder": ("--folder x.NPZ", "--folder x.NPZ"),
    "this folder": ("--folder .", "--folder ."),
    "no tokens": ("--reconstruct there --npz a.npz --reference-npz b.npz --tokens -8", "--tokens -8"),
    "a grid too large for GIF": ("--num 6001 --gif x.gif --out x.png", "x.gif"),
    "a grid too large for JPEG": ("--num 9001 --trajectory x.JPG --out x.png", "x.JPG"),
    "no picture": ("--num 0", "--num 0"),
    "no threads": ("--threads 0", "--threads 0"),
    "seed": ("--seed -1", "-1"),
    "seeds run out": (f"--seed {2**31 - 1} --num 2", str(2**31)),
    "guidance of three": ("--cfg 1 2 3", "--cfg"),
    "guidance that is none": ("--cfg nan", "--cfg"),
    "half a group": ("--tokens 6", "--tokens 6"),
    "half a group to reconstruct": ("--reconstruct . --npz x.npz --reference-npz y.npz --tokens 6", "--tokens 6"),
    "too many tokens to reconstruct": ("--reconstruct . --npz x.npz --reference-npz y.npz --tokens 36", "up to 32"),
    "too many tokens": ("--tokens 36", "up to 32"),
    "class": ("--classes c10", "c10"),
    "class of the layout": ("--prefix-class c99 --prefix-seed 1", "--prefix-class c99"),
    "layout of nothing": ("--prefix-tokens 8", "--prefix-image"),
    "layout of half a picture": ("--prefix-class c1", "--prefix-seed"),
    "layouts of two": ("--prefix-image x.png --prefix-class c1 --prefix-seed 1", "--prefix-image"),
    "layout of no file": ("--prefix-image none.png", "none.png"),
    "prefix too long": ("--prefix-class c1 --prefix-seed 1 --prefix-tokens 8 33", "8 33"),
    "prefix below zero": ("--prefix-class c1 --prefix-seed 1 --prefix-tokens -1", "-1"),
    "two kinds of set": ("--npz x.npz --folder x", "--folder"),
    "set and picture": ("--npz x.npz --gif", "--gif"),
    "ending of a set": ("--npz x.png", "x.png"),
    "folder of a set": ("--npz none/x.npz", "none/x.npz"),
    "ending of a film": ("--gif x.mp4", "x.mp4"),
    "reconstruction without a file": ("--reconstruct photos", "--npz"),
    "reconstruction into one file": ("--reconstruct . --npz x.npz --reference-npz x.npz", "--reference-npz"),
    "reconstruction of nothing": ("--reconstruct none --npz x.npz --reference-npz y.npz", "none"),
    "reference without reconstruction": ("--npz x.npz --reference-npz y.npz", "--reconstruct"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_it_and_leaves_nothing(model, capsys, mistake):
    words, named = MISTAKES[mistake]
    call("--ckpt", model, *words.split(), code=2)
    lines = [line for line in capsys.readouterr().err.split("\n") if "token" not in line or "error" in line]
    lines = [line for line in lines if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], lines
    assert os.listdir() == []


def test_a_folder_in_a_pictures_place_is_refused_before_drawing(model, capsys):
    os.mkdir("x.png")
    call("--ckpt", model, "--out", "x.png", code=2)
    assert capsys.readouterr().err.startswith("error: x.png")


def test_endings_count_in_any_case(model):
    call("--ckpt", model, "--num", 2, "--npz", "x.NPZ")
    assert np.load("x.NPZ")["arr_0"].shape == (2, 32, 32, 3)


def test_a_photograph_that_was_taken_upright_is_turned(model):
    """Its pixels lie on their side, and a note of the camera's says so (EXIF orientation 6)."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    upright.save("upright.png")
    note = Image.Exif()
    note[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save("lying.png", exif=note)
    for name in ("upright", "lying"):
        words = "--prefix-tokens 4 --classes c1 --num 1 --threads 1 --out".split()
        call("--ckpt", model, "--prefix-image", f"{name}.png", *words, f"{name}-drawn.png")
    assert Path("upright-drawn.png").read_bytes() == Path("lying-drawn.png").read_bytes()


def test_a_damaged_exif_turns_nothing(model):
    Image.new("RGB", (40, 64), "red").save("photo.jpg", exif=b"Exif\0\0garbage")
    call("--ckpt", model, *"--prefix-image photo.jpg --prefix-tokens 4 --classes c1 --out x.png".split())


# What users report


CHANGES = {
    "another name": lambda: os.rename("photos/2.png", "photos/x.png"),
    "another content": lambda: Image.new("RGB", (40, 40), "blue").save("photos/2.png"),
    "two that changed places": lambda: (
        os.rename("photos/2.png", "x"), os.rename("photos/3.png", "photos/2.png"), os.rename("x", "photos/3.png")
    ),
    "another time": lambda: os.utime("photos/2.png", (1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_reconstructions_of_other_files_do_not_continue_a_set(model, capsys, change):
    os.mkdir("photos")
    for i in range(5):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(f"photos/{i}.png")
    words = "--reconstruct photos --npz x.npz --reference-npz y.npz --batch 2".split()
    real, calls = dar.SequentialDiffusionTokenizer.decode, itertools.count()

    def decode(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*args)

    with patch.object(dar.SequentialDiffusionTokenizer, "decode", decode):
        call("--ckpt", model, *words, code=130)
    assert marks(Path("x.npz.part")) == 1
    kept = {name: shutil.copy2(f"photos/{name}", ".") for name in ("2.png", "3.png")}
    CHANGES[change]()
    capsys.readouterr()
    call("--ckpt", model, *words, code=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "x.npz.part: another set, half done (photographs was" in error
    for path in Path("photos").glob("[23x].png"):
        path.unlink()
    for name, copy in kept.items():
        shutil.copy2(copy, f"photos/{name}")
    call("--ckpt", model, *words)
    assert np.load("y.npz")["arr_0"][:, 0, 0, 0].tolist() == list(range(5))


EARLY = {
    "bundle in a folder's place": ("--save-bundle there", "there"),
    "bundle without a folder": ("--save-bundle none/x.pt", "none/x.pt"),
    "bundle without a name": ("--save-bundle=", "expected a file's name"),
    "bundle that is a picture": ("--save-bundle x.png", "x.png"),
    "set in no folder": ("--folder none/x", "none/x"),
    "set in a file's place": ("--folder file.npy", "file.npy"),
    "set at the top": ("--folder /", "--folder /"),
    "archive in a folder's place": ("--npz there.npz", "there.npz"),
    "archive of a folder without a name": ("--npz=", "expected a file's name"),
    "picture without a name": ("--out=", "expected a file's name"),
    "tokenizer without a name": ("--tokenizer=", "'.'"),
    "a film in a format of stills": ("--gif x.jpg", "x.jpg"),
    "a film as BMP": ("--gif x.bmp", "x.bmp"),
    "a film as TIFF": ("--gif x.tif", "x.tif"),
    "one file by two names": ("--reconstruct . --npz x.npz --reference-npz there/../x.npz", "--reference-npz"),
    "threads beyond reason": ("--threads 100000", "--threads 100000"),
    "seed": ("--seed 99999999999999999999", "--seed 99999999999999999999"),
    "seed of the layout": ("--prefix-class c1 --prefix-seed -1", "--prefix-seed -1"),
}


@pytest.mark.parametrize("mistake", EARLY)
def test_what_cannot_be_written_or_meant_is_refused_before_loading(capsys, mistake):
    os.mkdir("there"), os.mkdir("there.npz"), Path("file.npy").touch()
    before, (words, named) = sorted(os.listdir()), EARLY[mistake]
    call("--ckpt", "none.pt", *words.split(), code=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and named in error and "none.pt" not in error
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    "words", [("--out", "x.png"), ("--npz", "x.npz"), ("--folder", "x"), ("--save-bundle", "x.pt")]
)
def test_a_folder_that_may_not_be_written_to_is_named_before_loading(capsys, monkeypatch, words):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    call("--ckpt", "none.pt", *words, code=2)
    assert words[1] in capsys.readouterr().err


@pytest.mark.parametrize("kind", [".gif", ".png", ".webp"])
def test_films_may_have_any_format_of_films(model, kind):
    call("--ckpt", model, "--num", 1, "--gif", f"film{kind}", "--out", "x.png")
    assert Image.open(f"film{kind}").n_frames == 9


def test_names_of_classes_that_differ_in_their_case_alone_are_told_apart():
    names = ["Cat", "cat", "Dog", "crane", "crane", "7"]
    assert sample.parse_classes(["cat", "Cat", "CAT", "dog", "crane", "7", "0"], names) == [1, 0, 1, 2, 3, 5, 0]
    with pytest.raises(ValueError, match="--classes 9: no such class"):
        sample.parse_classes(["9"], names)


def test_names_that_the_font_lacks_are_shown_by_their_numbers(make_ar, make_tokenizer):
    shown, ar = [], make_ar(num_classes=6)
    ar.attach_tokenizer(make_tokenizer())
    ar.class_names = ["猫", "café", "two\nlines", "plain, old", "\udcff", "dog\x07"]
    dar.save_checkpoint("x.pt", ar)
    real = sample.labelled_grid

    def grid(images, labels, columns):
        shown.append(labels)
        return real(images, labels, columns)

    with patch.object(sample, "labelled_grid", grid):
        call("--ckpt", "x.pt", "--classes", *ar.class_names, "--out", "x.png")
        call("--ckpt", "x.pt", "--num", 1, "--trajectory", "--out", "x.png")
    assert shown[0][:6] == ["0", "1", "2", "plain, old", "4", "5"] and shown[-1][-1] == "0"


def upright(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 4), np.uint8)
    pixels[..., 3] = 255
    image = Image.fromarray(pixels)
    return Image.fromarray(pixels[..., 0] * np.uint16(257)) if mode == "I;16" else image.convert(mode)


@pytest.mark.parametrize("name, mode", [("x.png", "RGBA"), ("x.webp", "RGBA"), ("x.png", "L"), ("x.png", "I;16")])
def test_photographs_of_any_mode_are_turned(model, name, mode):
    image, note, seen = upright(mode), Image.Exif(), []
    note[0x0112] = 6
    os.mkdir("lying")
    image.save(name, lossless=True)
    image.transpose(Image.Transpose.ROTATE_90).save(f"lying/{name}", exif=note, lossless=True)
    real = dar.center_crops

    def crops(images, size):
        seen.append(real(images, size))
        return seen[-1]

    with patch.object(dar, "center_crops", crops):
        for file in (name, f"lying/{name}"):
            words = "--prefix-tokens 4 --classes c1 --num 1 --out drawn.png --prefix-image".split()
            call("--ckpt", model, *words, file)
    assert torch.equal(*seen)
