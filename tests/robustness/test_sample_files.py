"""sample.py and its files: sets that are killed, settings that change, full disks, odd names, and
what is refused before anything is drawn."""

import itertools
import os
import resource
import shutil
import signal
import socket
import subprocess

import numpy as np
import pytest
import torch
from command_lines import call, command, environment, wait_for
from PIL import Image

import dar
import sample
from common.cli import command_line

CPU = "--device cpu --dtype float32".split()
QUICK = "--tokens 4 --steps 2"
SET = f"--num 12 --batch 4 {QUICK} --npz x.npz"
RECONSTRUCT = f"--reconstruct photos --batch 2 {QUICK} --npz x.npz --reference-npz y.npz"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_ar, make_tokenizer):
    ar = make_ar()
    ar.attach_tokenizer(make_tokenizer())
    path = tmp_path_factory.mktemp("checkpoint") / "ar.pt"
    dar.save_checkpoint(path, ar)
    return path


@pytest.fixture
def draw(checkpoint, tmp_path):
    """A function that runs sample.py with arguments in the test's folder."""

    def draw(words, *more):
        call("sample.py", "--ckpt", checkpoint, *CPU, *words.split(), *more, cwd=tmp_path)

    return draw


@pytest.fixture
def interrupt(draw, monkeypatch):
    """A function that runs sample.py and presses Ctrl-C once some batches are done."""

    def interrupt(words, *more, after):
        batches = itertools.count()
        with monkeypatch.context() as patches:
            for module, name in ((dar, "stream"), (sample, "center_crops")):
                original = getattr(module, name)

                def stop(*args, original=original, **options):
                    if next(batches) == after:
                        raise KeyboardInterrupt
                    return original(*args, **options)

                patches.setattr(module, name, stop)
            with pytest.raises(KeyboardInterrupt):
                draw(words, *more)

    return interrupt


@pytest.fixture
def drawn_batches(monkeypatch):
    """A list that grows by the seeds of each batch that is drawn."""
    batches = []
    original = dar.stream

    def stream(ar, tokenizer, labels, cfg, seeds, **options):
        batches.append(seeds)
        return original(ar, tokenizer, labels, cfg, seeds, **options)

    monkeypatch.setattr(dar, "stream", stream)
    return batches


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


# Stopped sets


def test_stopped_set_goes_on(draw, interrupt, drawn_batches, tmp_path):
    draw(f"--num 12 --batch 4 {QUICK} --npz whole.npz")
    interrupt(SET, after=2)
    drawn_batches.clear()
    draw(SET)
    assert drawn_batches == [[8, 9, 10, 11]]
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not (tmp_path / "x.npz.part").exists()


def test_stopped_folder_goes_on(draw, interrupt, drawn_batches, tmp_path):
    words = f"--num 12 --batch 4 {QUICK} --folder x"
    interrupt(words, after=2)
    assert len(list((tmp_path / "x").glob("*.png"))) == 8
    drawn_batches.clear()
    draw(words)
    assert drawn_batches == [[8, 9, 10, 11]]
    assert len(list((tmp_path / "x").glob("*.png"))) == 12


@pytest.mark.slow
@pytest.mark.parametrize("target", ["--npz x.npz", "--folder x"])
def test_killed_set_is_finished_by_other_processes(draw, checkpoint, tmp_path, target):
    settings = f"--num 80 --batch 4 {QUICK} {target}".split()
    words = ["sample.py", "--ckpt", checkpoint, *CPU, *settings]
    two = start_workers(2, words, tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("x*.part/chunk-*.npz"))) >= 3, two[0])
    for process in two:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert [process.returncode for process in two] == [-signal.SIGKILL] * 2
    for process in start_workers(3, words, tmp_path):
        process.communicate()

    draw(f"--num 80 --batch 4 {QUICK} --npz whole.npz")
    expected = np.load(tmp_path / "whole.npz")["arr_0"]
    if target.startswith("--npz"):
        assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    else:
        paths = sorted((tmp_path / "x").iterdir())  # without anything half written
        assert np.array_equal(np.stack([Image.open(path) for path in paths]), expected)


def start_workers(world, words, cwd):
    """As torchrun starts them, but none is left when they are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        variables = environment(
            RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        process = subprocess.Popen(
            command(*words), cwd=cwd, env=variables, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
    return processes


def test_full_disk_keeps_what_is_drawn(draw, drawn_batches, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a chunk fits, three together do not
    try:
        with pytest.raises(OSError, match="x.npz: cannot be written"):
            draw(SET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    drawn_batches.clear()
    draw(SET)
    assert drawn_batches == []
    assert len(np.load(tmp_path / "x.npz")["arr_0"]) == 12


def test_stop_between_the_two_files_of_a_reconstruction(draw, photos, monkeypatch, tmp_path):
    original = sample.write_npz

    def write_npz(path, *args, **options):
        if path.name == "y.npz":
            raise KeyboardInterrupt
        original(path, *args, **options)

    with monkeypatch.context() as patches:
        patches.setattr(sample, "write_npz", write_npz)
        with pytest.raises(KeyboardInterrupt):
            draw(RECONSTRUCT)
    draw(RECONSTRUCT)
    assert np.load(tmp_path / "y.npz")["arr_0"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


# Sets whose settings change


@pytest.mark.parametrize(
    "option, name",
    [
        ("--seed 5", "seed"),
        ("--cfg none", "cfg"),
        ("--classes 1 2", "classes"),
        ("--num 13", "num"),
        ("--batch 3", "batch"),
        ("--dtype bfloat16", "dtype"),
        ("--threads 2", "threads"),
    ],
)
def test_other_settings_do_not_continue_a_set(draw, interrupt, option, name):
    interrupt(SET, after=1)
    with pytest.raises(ValueError, match=f"x.npz.part: half done with another {name} "):
        draw(SET, *option.split())


def test_other_weights_do_not_continue_a_set(draw, interrupt, make_ar, make_tokenizer, tmp_path):
    interrupt(SET, after=1)
    other = make_ar(seed=2)
    other.attach_tokenizer(make_tokenizer())
    dar.save_checkpoint(tmp_path / "other.pt", other)
    with pytest.raises(ValueError, match="half done with another weights"):
        draw(SET, "--ckpt", "other.pt")


def test_same_weights_elsewhere_continue_a_set(draw, interrupt, checkpoint, tmp_path):
    interrupt(SET, after=1)
    shutil.copy(checkpoint, tmp_path / "moved.pt")
    draw(SET, "--ckpt", "moved.pt")


def test_nothing_drawn_yet_settings_may_change(draw, interrupt, tmp_path):
    interrupt(SET, "--seed", "5", after=0)
    draw(SET)
    assert (tmp_path / "x.npz").exists()


def rename(folder):
    os.rename(folder / "2.png", folder / "2b.png")


def replace(folder):
    Image.effect_noise((40, 40), 64).convert("RGB").save(folder / "2.png")


def touch(folder):
    os.utime(folder / "2.png", (1, 1))


@pytest.mark.parametrize("change", [rename, replace, touch])
def test_other_photographs_do_not_continue_a_reconstruction(draw, interrupt, photos, change):
    interrupt(RECONSTRUCT, after=1)
    change(photos)
    with pytest.raises(ValueError, match="half done with another photographs"):
        draw(RECONSTRUCT)


def test_foreign_folder_in_the_place_of_the_chunks(draw, tmp_path):
    (tmp_path / "x.npz.part").mkdir()
    (tmp_path / "x.npz.part" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="x.npz.part: exists already"):
        draw(SET)


@pytest.mark.slow
def test_one_refusal_for_all_processes(checkpoint, tmp_path):
    (tmp_path / "x.npz").touch()
    words = ["sample.py", "--ckpt", checkpoint, *CPU, "--npz", "x.npz"]
    two = start_workers(2, words, tmp_path)
    said = "".join(process.communicate()[1] for process in two)
    assert [process.returncode for process in two] == [2, 2]
    assert said.count("error: x.npz: exists already") == said.count("error") == 1


def test_sets_take_one_thread(draw, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    draw(f"--num 1 {QUICK} --npz x.npz")
    draw(f"--num 1 {QUICK} --npz y.npz --threads 2")
    assert chosen == [1, 2]


# Odd names and odd photographs


def test_name_that_is_no_text(draw, photos, tmp_path):
    os.rename(photos / "4.png", os.fsencode(photos) + b"/\xff.png")
    draw(RECONSTRUCT)
    assert len(np.load(tmp_path / "x.npz")["arr_0"]) == 5


def test_damaged_photograph_is_named(draw, photos):
    (photos / "3.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="photos/3.png: not a readable image"):
        draw(RECONSTRUCT)


def test_photograph_with_a_damaged_body_is_named_before_any_is_decoded(draw, photos, tmp_path):
    Image.effect_noise((40, 40), 64).save(photos / "3.png")
    whole = (photos / "3.png").read_bytes()
    (photos / "3.png").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="photos/3.png: not a readable image"):
        draw(RECONSTRUCT)
    assert not (tmp_path / "x.npz.part").exists()
    draw(RECONSTRUCT, "--num", "3")  # without it
    (photos / "3.png").write_bytes(whole)
    for name in ("x.npz", "y.npz"):
        (tmp_path / name).unlink()
    draw(RECONSTRUCT)


def test_layout_of_a_photograph_with_damaged_exif(draw, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png", exif=b"no" + exif.tobytes()[8:])
    draw(f"--prefix-image photo.png --prefix-tokens 2 --num 1 {QUICK} --out x.png")
    assert (tmp_path / "x.png").exists()


def test_damaged_photograph_of_a_layout_is_named(draw, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="photo.png: not a readable image"):
        draw("--prefix-image photo.png")


def test_class_names_that_the_font_lacks(draw, make_ar, make_tokenizer, tmp_path):
    ar = make_ar(num_classes=5)
    ar.attach_tokenizer(make_tokenizer())
    ar.class_names = ["猫", "two\nlines", "\udcff", "dog\x07", "plain, old"]
    dar.save_checkpoint(tmp_path / "odd.pt", ar)
    draw(f"--ckpt odd.pt --num 5 {QUICK} --trajectory --out x.png")
    captions = [sample.caption(ar.class_names, label) for label in range(5)]
    assert captions == ["0", "1", "2", "3", "plain, old"]


@pytest.mark.parametrize("ending", [".gif", ".png", ".webp"])
def test_every_format_of_animations(draw, tmp_path, ending):
    draw(f"--num 1 --gif film{ending} --out x.png")
    assert Image.open(tmp_path / f"film{ending}").n_frames == 9


def test_endings_in_capitals(draw, tmp_path):
    draw(f"--num 1 {QUICK} --npz x.NPZ")
    assert np.load(tmp_path / "x.NPZ")["arr_0"].shape == (1, 32, 32, 3)


# Refused before weights are read


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """A function that runs sample.py as a program, with weights that do not exist; returns what it
    says of another mistake."""

    def refuse(words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["sample.py", "--ckpt", "none.pt", *words.split()])
        with pytest.raises(SystemExit) as ended:
            command_line(sample.main)
        assert ended.value.code == 2
        message = capsys.readouterr().err
        assert "none.pt" not in message
        return message.splitlines()[-1]

    return refuse


@pytest.mark.parametrize(
    "option", ["--out", "--trajectory", "--gif", "--npz", "--reference-npz", "--save-bundle"]
)
def test_ending_that_is_no_format(refuse, option):
    assert "x.mp4' does not end in" in refuse(f"{option} x.mp4")


def test_folder_in_a_files_place(refuse, tmp_path):
    (tmp_path / "x.npz").mkdir()
    assert "x.npz: is a folder" in refuse("--npz x.npz")


def test_missing_folder(refuse):
    assert "none/x.png: its folder is missing" in refuse("--out none/x.png")


def test_closed_folder(refuse, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whose owner is root may write
    assert "x.npz: its folder is missing or not writable" in refuse("--npz x.npz")


@pytest.mark.parametrize("words", ["--cfg 1 2 3", "--cfg nan", "--cfg none 4", "--cfg much"])
def test_guidance_that_is_none(refuse, words):
    assert words.split()[-1] in refuse(words)


@pytest.mark.parametrize("words", ["--num 0", "--seed -1", "--threads 100000", "--top-p 2"])
def test_numbers_out_of_range(refuse, words):
    assert words.replace(" ", ": ") in refuse(words)


def test_half_precision_on_a_cpu(refuse):
    assert "--dtype float16: only on a GPU" in refuse("--device cpu --dtype float16")
