"""Chapter 10: pictures, lists of images, processes, files that appear whole, mistakes in one line."""

import ctypes
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import dar

ROOT = Path(dar.__file__).parent


def test_rounding_to_uint8_is_adms():
    x = torch.tensor([-2.0, -1.0, -1 + 1 / 127.5, 0.0, 0.999, 1.0, 2.0])
    expected = [min(max(int(127.5 * v + 128), 0), 255) for v in x.tolist()]
    assert dar.to_uint8(x).tolist() == expected
    everything = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(dar.to_uint8(dar.to_float(everything)), everything)


def test_psnr_is_that_of_8_bit_ranges():
    a = torch.zeros(1, 3, 4, 4)
    assert dar.psnr(a + 0.2, a).item() == pytest.approx(20 * np.log10(2 / 0.2), abs=1e-4)
    assert dar.psnr(a + 7, a + 1).item() == float("inf")  # clamped first


def test_tile_puts_pictures_row_by_row():
    images = torch.stack([torch.full((3, 2, 2), v) for v in (-1.0, 0.0, 1.0)])
    pixels = np.asarray(dar.tile(images, 2, gap=1))
    assert pixels.shape == (7, 7, 3)
    assert pixels[1, 1, 0] == 0 and pixels[1, 4, 0] == 128 and pixels[4, 1, 0] == 255 and pixels[0, 0, 0] == 255


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "1", "F"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    ramp = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "P":
        image = Image.fromarray(np.stack([ramp] * 3, -1)).quantize(16)
    else:
        image = Image.fromarray(ramp).convert(mode, dither=0) if mode == "1" else Image.fromarray(ramp).convert(mode)
    path = tmp_path / ("x.tif" if mode in ("F", "CMYK") else "x.png")
    image.save(path)
    found = np.asarray(dar.load_rgb(path))
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    expected = np.where(ramp >= 128, 255, 0) if mode == "1" else ramp
    assert np.abs(found.astype(int) - expected[..., None]).max() <= 8


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "x.png")
    assert (np.asarray(dar.load_rgb(tmp_path / "x.png")) == 255).all()


@pytest.mark.parametrize("kind, scale", [(np.float32, 1 / 255), (np.float32, 1), (np.int32, 1), (np.int32, 257)])
def test_32_bit_pictures_keep_their_greys(tmp_path, kind, scale):
    ramp = np.tile(np.arange(0, 256, 5), (16, 1))
    Image.fromarray((ramp * scale).astype(kind)).save(tmp_path / "x.tif")
    found = np.asarray(dar.load_rgb(tmp_path / "x.tif"))
    assert np.abs(found.astype(int) - ramp[..., None]).max() <= 1


@pytest.mark.parametrize("error", [TypeError, RuntimeError, NotImplementedError, Image.DecompressionBombError])
def test_whatever_a_decoder_stumbles_over_the_image_is_named(tmp_path, error, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")

    def load(self):
        raise error("odd tag")

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ValueError, match="x.png.*odd tag"):
        dar.load_rgb(tmp_path / "x.png")


def test_long_notes_in_a_png_do_not_make_it_corrupt(tmp_path):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("notes", "x" * 2_000_000, zip=True)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "x.png", pnginfo=notes, icc_profile=bytes(2_000_000))
    assert np.asarray(dar.load_rgb(tmp_path / "x.png"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 65000), (65000, 1), (3, 3), (500, 20)])
def test_extreme_shapes_are_cropped_in_little_memory(size):
    assert dar.center_crop(Image.new("RGB", size), 64).size == (64, 64)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_a_corrupt_image_is_named(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match="bad.png"):
        dar.load_rgb(tmp_path / "bad.png")


def test_center_crop_keeps_the_middle_and_the_aspect():
    wide = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (50, 1, 3)))
    found = np.asarray(dar.center_crop(wide, 50))
    assert found.shape == (50, 50, 3) and (found[0, :, 0] == np.arange(75, 125)).all()
    for size in ((640, 480), (333, 500), (64, 64), (20, 31)):
        assert dar.center_crop(Image.new("RGB", size), 64).size == (64, 64)


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def test_images_are_listed_in_order_with_slashes_and_hidden_ones_left_out(tmp_path):
    shown = ["a/1.PNG", "a/b/2.jpg", "c.webp"]
    hidden = [".x/1.png", "a/.ipynb_checkpoints/1.png", "a/._1.png", "__MACOSX/a/1.png"]
    pictures(tmp_path, *shown, *hidden)
    (tmp_path / "a" / "notes.txt").touch()
    assert dar.list_images(tmp_path) == dar.list_images(str(tmp_path)) == shown


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    pictures(tmp_path, "data/a/1.png", "data/b/2.png", "elsewhere/3.png")
    data = tmp_path / "data"
    (data / "c").symlink_to(tmp_path / "elsewhere")
    (data / "a" / "up").symlink_to(data)
    assert dar.list_images(data) == ["a/1.png", "b/2.png", "c/3.png"]
    (data / "a" / "side").symlink_to(data / "b")  # two links that lead to one another
    (data / "b" / "side").symlink_to(data / "a")
    assert dar.list_images(data) == ["a/1.png", "a/side/2.png", "b/2.png", "b/side/1.png", "c/3.png"]


def test_a_closed_or_empty_or_missing_folder_is_named(tmp_path, monkeypatch):
    pictures(tmp_path, "open/1.png", "closed/2.png")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dar.list_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no images"):
        dar.list_images(tmp_path / "empty")
    real = Path.iterdir

    def iterdir(path):  # root may read everything
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(PermissionError, match="closed"):
        dar.list_images(tmp_path)


def test_the_file_before_gets_the_name_that_it_is_given(tmp_path):
    for text in (b"one", b"two", b"three"):
        dar.write_atomically(tmp_path / "x", lambda file: file.write(text), before=tmp_path / "y")  # noqa: B023
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == [("x", b"three"), ("y", b"two")]


def test_what_the_first_process_cannot_do_ends_all():
    process, calls = dar.Processes(torch.device("cpu")), []
    assert process.first_alone(lambda: calls.append(1) or "done") == "done" and calls == [1]

    def fail():
        raise ValueError("x is odd")

    with pytest.raises(ValueError, match="x is odd"):
        process.first_alone(fail)


def test_a_fingerprint_follows_weights_and_config(make_ar):
    same, other = make_ar(), make_ar()
    with torch.no_grad():
        other.norm.weight[3] += 1e-6
    prints = [dar.fingerprint([model]) for model in (make_ar(), same, other, make_ar(dropout=0.3))]
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize(
    "body, code, words",
    [
        ("raise ValueError('x = 3\\nis odd')", 2, "error: x = 3 is odd"),
        ("raise FileNotFoundError('a: no such file')", 2, "error: a: no such file"),
        ("raise KeyboardInterrupt", 130, "stopped"),
        ("raise FloatingPointError('step 3: not finite')", 3, "error: step 3: not finite"),
        ("return 143", 143, ""),
        ("return None", 0, ""),
    ],
)
def test_mistakes_end_in_one_line_and_an_exit_code(body, code, words, capsys):
    names = {"dar": dar}
    exec(f"def main():\n    {body}", names)
    with pytest.raises(SystemExit) as ended:
        dar.command_line(names["main"])
    assert (ended.value.code or 0) == code and capsys.readouterr().err.strip() == words


def test_a_device_that_is_not_there_is_refused():
    assert dar.pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            dar.pick_device("cuda")


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="about the malloc of Linux's glibc"
)
def test_freed_memory_is_kept():
    """Counts the pages that the system hands out while 64 MB are taken and freed twenty times."""
    program = (
        "import resource, torch, dar\n"
        "pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def main():\n"
        "    for i in range(40):\n"
        "        before = pages() if i == 20 else i and before\n"
        "        torch.ones(2**24)\n"
        "    print(pages() - before)\n"
        "{}"
    )
    found = []
    for start in ("main()", "dar.keep_freed_memory(); main()"):
        command = [sys.executable, "-c", program.format(start)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found.append(int(done.stdout))
    plain, kept = found
    assert kept < 1000 and kept < plain / 10


@pytest.mark.parametrize("platform, library", [("linux", types.SimpleNamespace()), ("darwin", None), ("win32", None)])
def test_where_there_is_no_glibc_nothing_is_asked_of_it(monkeypatch, platform, library):
    def load(name):
        assert library is not None, "no library is loaded where it has no such function"
        return library  # musl's, for example, which has no mallopt

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", load)
    dar.keep_freed_memory()


def test_a_closed_stderr_changes_nothing():
    program = (
        "import dar, sys\ndef main():\n    print('lost', file=sys.stderr)\n    print('done')\ndar.command_line(main)"
    )
    command = f'exec "{sys.executable}" -c "{program}" 2>&-'
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")
