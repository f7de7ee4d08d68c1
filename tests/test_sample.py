"""sample.py as its users meet it: pictures, layouts, sets, reconstructions, bundles.

All is drawn by a Llama of random weights, 32 tokens in 8 groups, in float32 on one thread, where
pictures can be compared to those of dar.stream, pixel by pixel."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import call
from PIL import Image, ImageDraw, ImageSequence

import dar
import sample
from common.images import center_crop, center_crops, psnr, to_float, to_uint8
from common.speed import prepare_for_sampling

CPU = "--device cpu --dtype float32".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_ar, make_tokenizer):
    """A Llama's file with its tokenizer, and ten classes c0 ... c9."""
    ar = make_ar()
    ar.attach_tokenizer(make_tokenizer())
    ar.class_names = [f"c{i}" for i in range(10)]
    path = tmp_path_factory.mktemp("checkpoint") / "ar.pt"
    dar.save_checkpoint(path, ar)
    return path


@pytest.fixture(scope="module")
def ar(checkpoint):
    return prepare_for_sampling(dar.load_ar(checkpoint))


@pytest.fixture
def draw(checkpoint, tmp_path):
    """A function that runs sample.py with arguments in the test's folder."""

    def draw(words, *more):
        call("sample.py", "--ckpt", checkpoint, *CPU, *words.split(), *more, cwd=tmp_path)

    return draw


@pytest.fixture
def photograph(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "photo.png")
    return image


def steps_of(ar, labels, seeds, **options):
    """What dar.stream yields with sample.py's defaults."""
    return list(dar.stream(ar, ar.tokenizer, torch.tensor(labels), 4.0, seeds, **options))


def uint8(images):
    return to_uint8(images).permute(0, 2, 3, 1).numpy()


def assert_same_picture(path, expected):
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected))


# Pictures


def test_each_picture_has_its_class_and_seed(draw, ar, tmp_path):
    draw("--classes c3 7 --num 4 --seed 5 --out x.png")
    images = steps_of(ar, [3, 7, 3, 7], [5, 6, 7, 8])[-1].x
    expected = sample.labelled_grid(images, ["c3", "c7", "c3", "c7"], columns=2)
    assert_same_picture(tmp_path / "x.png", expected)


def test_batch_changes_no_picture(draw, ar, tmp_path):
    draw("--num 3 --batch 2 --out x.png")
    first = steps_of(ar, [0, 1], [0, 1])[-1].x
    second = steps_of(ar, [2], [2])[-1].x
    images = torch.cat((first, second))
    assert_same_picture(tmp_path / "x.png", sample.labelled_grid(images, ["c0", "c1", "c2"], 3))


@pytest.mark.parametrize(
    "words, columns", [("--num 12", 10), ("--num 9", 9), ("--num 5 --classes 1 2", 2)]
)
def test_few_classes_have_a_column_each(draw, ar, tmp_path, words, columns):
    draw(f"{words} --tokens 4 --out x.png")
    assert Image.open(tmp_path / "x.png").width == columns * (96 + 4)


def test_pictures_of_one_class_fill_rows(draw, tmp_path):
    draw("--num 9 --classes c1 --tokens 4 --out x.png")
    assert Image.open(tmp_path / "x.png").width == 8 * (96 + 4)


def test_trajectory_shows_previews_then_result(draw, ar, tmp_path):
    draw("--num 2 --trajectory t.png --out x.png")
    steps = steps_of(ar, [0, 1], [0, 1])
    frames = [step.preview for step in steps] + [steps[-1].x]
    images = torch.stack(frames, 1).flatten(0, 1)
    captions = [f"{tokens} tokens" for tokens in range(4, 33, 4)]
    expected = sample.labelled_grid(images, [*captions, "c0", *captions, "c1"], columns=9)
    assert_same_picture(tmp_path / "t.png", expected)


def test_trajectory_without_name_takes_the_place_of_the_grid(draw, tmp_path):
    draw("--num 2 --trajectory t.png --out grid.png")
    draw("--num 2 --trajectory --out x.png")
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "t.png").read_bytes()


def test_animation_runs_through_previews_to_result(draw, ar, tmp_path):
    draw("--num 2 --gif film.png --out x.png")
    steps = steps_of(ar, [0, 1], [0, 1])
    frames = [step.preview for step in steps] + [steps[-1].x]
    film = Image.open(tmp_path / "film.png")
    assert film.n_frames == len(frames)
    for shown, images in zip(ImageSequence.Iterator(film), frames):
        expected = sample.labelled_grid(images, ["c0", "c1"], columns=2)
        assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(expected))


def test_animation_without_name_is_named_after_the_grid(draw, tmp_path):
    draw("--num 1 --gif --out x.png")
    assert Image.open(tmp_path / "x.gif").n_frames == 9


@pytest.mark.parametrize("tokens", [4, 16, 32])
def test_few_tokens_give_what_they_decode_to(draw, ar, tmp_path, tokens):
    draw(f"--num 2 --tokens {tokens} --out x.png")
    codes = steps_of(ar, [0, 1], [0, 1])[-1].codes[:, :tokens]
    noise = dar.initial_noise([0, 1], 32, torch.device("cpu"))
    images = ar.tokenizer.decode(codes, noise)
    assert_same_picture(tmp_path / "x.png", sample.labelled_grid(images, ["c0", "c1"], 2))


def test_tokens_come_in_whole_groups(draw):
    with pytest.raises(ValueError, match="--tokens 6: expected a multiple of 4"):
        draw("--tokens 6")


def test_sampling_options_reach_the_models(draw, ar, tmp_path):
    options = dict(temperature=0.8, top_k=20, top_p=0.9, num_steps=12, solver="euler")
    words = "--temperature 0.8 --top-k 20 --top-p 0.9 --steps 12 --solver euler --cfg 1.1 6"
    draw(words, *"--num 1 --out x.png".split())
    *_, step = dar.stream(ar, ar.tokenizer, torch.tensor([0]), (1.1, 6.0), [0], **options)
    assert_same_picture(tmp_path / "x.png", sample.labelled_grid(step.x, ["c0"], 1))


@pytest.mark.parametrize("words, cfg", [("4", 4.0), ("1.1 6", [1.1, 6.0]), ("none", None)])
def test_guidance_is_a_number_a_pair_or_none(monkeypatch, words, cfg):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--cfg", *words.split()])
    assert sample.parse_arguments().cfg == cfg


# Classes


def test_classes_are_names_or_numbers():
    names = ["Cat", "cat", "dog", "crane", "crane", "7"]
    words = ["cat", "CAT", "Dog", "crane", "7", "0"]
    assert sample.parse_classes(words, names) == [1, 0, 2, 3, 5, 0]


def test_unknown_class_is_named():
    with pytest.raises(ValueError, match="no class 9: there are 0 ... 1 .cat, dog"):
        sample.parse_classes(["cat", "9"], ["cat", "dog"])


def test_thousand_classes_without_names_are_those_of_imagenet(make_ar):
    assert sample.class_names(make_ar(num_classes=1000))[207] == "golden retriever"


def test_long_caption_is_shortened_to_the_width_of_its_picture():
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    shown = sample.shorten("black-footed ferret", 70, draw)
    assert shown.startswith("black") and shown.endswith("…")
    assert draw.textlength(shown) <= 70


# Layout control


def test_layout_keeps_the_first_tokens_of_a_photograph(draw, ar, photograph, tmp_path):
    words = "--prefix-image photo.png --prefix-tokens 0 6 32 --classes c3 7 --seed 20 --out x.png"
    draw(words)
    source = center_crops([photograph], 32)
    codes = ar.tokenizer.encode(source)
    images = []
    captions = []
    for kept in (0, 6, 32):
        step = steps_of(ar, [3, 7], [20, 21], prefix=codes[:, :kept])[-1]
        assert torch.equal(step.codes[:, :kept], codes[:, :kept].expand(2, -1))
        images += [source, step.x]
        captions += [f"{kept} of 32 kept", "c3", "c7"]
    expected = sample.labelled_grid(torch.cat(images), captions, columns=3)
    assert_same_picture(tmp_path / "x.png", expected)


def test_layout_of_a_drawn_picture(draw, ar, tmp_path):
    draw("--prefix-class c1 --prefix-seed 9 --classes c3 --out x.png")
    source = steps_of(ar, [1], [9])[-1]
    images = []
    captions = []
    for kept in (4, 8, 12, 16):  # 1/8, 1/4, 3/8, 1/2 of 32
        images += [source.x, steps_of(ar, [3], [0], prefix=source.codes[:, :kept])[-1].x]
        captions += [f"{kept} of 32 kept", "c3"]
    expected = sample.labelled_grid(torch.cat(images), captions, columns=2)
    assert_same_picture(tmp_path / "x.png", expected)


def test_photograph_is_turned_as_the_camera_was_held(make_ar, make_tokenizer, tmp_path):
    ar = make_ar()
    ar.attach_tokenizer(make_tokenizer())
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    upright = Image.fromarray(pixels)
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: its pixels lie on their side
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    expected, _ = sample.encode_photograph(ar, tmp_path / "upright.png")
    image, _ = sample.encode_photograph(ar, tmp_path / "lying.png")
    assert torch.equal(image, expected)


def test_more_kept_tokens_than_there_are(draw):
    with pytest.raises(ValueError, match="--prefix-tokens 33: there are 32"):
        draw("--prefix-class c1 --prefix-tokens 8 33")


def test_layout_of_few_tokens(draw, ar, tmp_path):
    draw("--prefix-class c1 --prefix-tokens 4 8 --tokens 8 --classes c3 --out x.png")
    source = steps_of(ar, [1], [0])[-1]
    images = []
    captions = []
    for kept in (4, 8):
        steps = steps_of(ar, [3], [0], prefix=source.codes[:, :kept])
        images += [source.x, next(step.preview for step in steps if step.codes.shape[1] == 8)]
        captions += [f"{kept} of 8 kept", "c3"]
    expected = sample.labelled_grid(torch.cat(images), captions, columns=2)
    assert_same_picture(tmp_path / "x.png", expected)
    draw("--prefix-class c1 --tokens 8 --classes c3 --out x.png")  # keeps half at most


def test_more_kept_tokens_than_are_drawn(draw):
    with pytest.raises(ValueError, match="--prefix-tokens 16: there are 8"):
        draw("--prefix-class c1 --prefix-tokens 8 16 --tokens 8")


# Sets


def test_set_holds_pictures_and_classes(draw, ar, tmp_path):
    draw("--num 5 --batch 3 --seed 7 --balanced --classes c4 2 --npz x.npz")
    first = steps_of(ar, [4, 2, 4], [7, 8, 9])[-1].x
    second = steps_of(ar, [2, 4], [10, 11])[-1].x
    archive = np.load(tmp_path / "x.npz")
    assert np.array_equal(archive["arr_0"], uint8(torch.cat((first, second))))
    assert archive["arr_1"].tolist() == [4, 2, 4, 2, 4]


def test_random_class_belongs_to_the_seed(draw, tmp_path):
    words = "--tokens 4 --batch 1 --npz"
    draw(f"--num 4 {words} x.npz")
    draw(f"--num 2 --seed 2 {words} y.npz")
    x = np.load(tmp_path / "x.npz")
    y = np.load(tmp_path / "y.npz")
    assert np.array_equal(x["arr_1"][2:], y["arr_1"])
    assert np.array_equal(x["arr_0"][2:], y["arr_0"])


def test_random_classes_are_all_drawn():
    labels = sample.choose_labels([3, 5, 8], num=300, seed=0, balanced=False)
    counts = [labels.count(label) for label in (3, 5, 8)]
    assert sum(counts) == 300 and min(counts) > 70
    assert labels[3:] != labels[:-3]  # not in turn


def test_folder_holds_the_same_pictures_in_order(draw, tmp_path):
    draw("--num 11 --batch 4 --tokens 4 --npz x.npz")
    draw("--num 11 --batch 4 --tokens 4 --folder pictures")
    archive = np.load(tmp_path / "x.npz")
    paths = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in paths] == [
        f"{i:02d}-{label}.png" for i, label in enumerate(archive["arr_1"])
    ]
    assert np.array_equal(np.stack([Image.open(path) for path in paths]), archive["arr_0"])
    assert not (tmp_path / "pictures.part").exists()


def test_finished_set_is_not_overwritten(draw, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"precious")
    with pytest.raises(ValueError, match="x.npz: exists already"):
        draw("--npz x.npz")
    assert (tmp_path / "x.npz").read_bytes() == b"precious"


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(draw, checkpoint, tmp_path):
    words = "--num 22 --batch 4 --npz"
    draw(words, "x.npz")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    script = Path(sample.__file__)
    command = [*torchrun, "--", script, "--ckpt", checkpoint, *CPU, *words.split(), "y.npz"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()


# Reconstructions


def test_reconstructions_and_their_originals(draw, ar, tmp_path, capsys):
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    crops = []
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (70 + i, 90, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / "deep" / f"{i}.png")
        crops.append(np.asarray(center_crop(Image.fromarray(pixels), 32)))
    draw("--reconstruct photos --npz ours.npz --reference-npz theirs.npz --batch 2")

    theirs = np.load(tmp_path / "theirs.npz")["arr_0"]
    assert np.array_equal(theirs, np.stack(crops))
    ours = np.load(tmp_path / "ours.npz")["arr_0"]
    originals = to_float(torch.from_numpy(theirs).permute(0, 3, 1, 2))
    decoded = []
    for batch in ([0, 1], [2]):
        noise = dar.initial_noise(batch, 32, torch.device("cpu"))
        decoded.append(ar.tokenizer.decode(ar.tokenizer.encode(originals[batch]), noise))
    assert np.array_equal(ours, uint8(torch.cat(decoded)))
    saved = to_float(torch.from_numpy(ours).permute(0, 3, 1, 2))
    assert f"PSNR {psnr(saved, originals).mean():.2f} dB" in capsys.readouterr().out


def test_reconstruct_only_the_first_images(draw, photograph, tmp_path):
    for name in ("0.png", "1.png", "2.png"):
        photograph.rotate(90).save(tmp_path / name)
    draw("--reconstruct . --num 2 --tokens 4 --npz ours.npz --reference-npz theirs.npz")
    assert len(np.load(tmp_path / "ours.npz")["arr_0"]) == 2


# Bundles


def test_bundle_draws_what_its_two_files_draw(draw, make_ar, make_tokenizer, tmp_path):
    dar.save_checkpoint(tmp_path / "ar.pt", make_ar(seed=2))
    dar.save_checkpoint(tmp_path / "tokenizer.pt", make_tokenizer(seed=2))
    files = "--ckpt ar.pt --tokenizer tokenizer.pt"
    draw(f"{files} --num 2 --out x.png")
    call("sample.py", *files.split(), "--save-bundle", "bundle.pt", cwd=tmp_path)
    draw("--ckpt bundle.pt --num 2 --out y.png")
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()


def test_bundle_in_half_precision(checkpoint, tmp_path):
    words = ["--ckpt", checkpoint, "--save-bundle", "half.pt", "--dtype", "float16"]
    call("sample.py", *words, cwd=tmp_path)
    assert dar.load_ar(tmp_path / "half.pt").output.weight.dtype == torch.float16
    assert dar.load_tokenizer(tmp_path / "half.pt").patchify.weight.dtype == torch.float16


def test_llama_without_tokenizer_asks_for_one(draw, make_ar, tmp_path):
    dar.save_checkpoint(tmp_path / "ar.pt", make_ar())
    with pytest.raises(
        ValueError, match="ar.pt: carries no tokenizer; give its own as --tokenizer"
    ):
        draw("--ckpt ar.pt")


# Modes


@pytest.mark.parametrize(
    "words",
    [
        "--npz x.npz --gif",
        "--folder x --prefix-class c1",
        "--reconstruct photos --npz x.npz",
        "--reference-npz y.npz --npz x.npz",
    ],
)
def test_options_of_two_modes_or_of_half_a_mode(draw, words):
    with pytest.raises(ValueError, match=words.split()[0]):
        draw(words)


SAVE_BUNDLE = "--save-bundle x.pt"
RECONSTRUCT = "--reconstruct . --npz x.npz --reference-npz y.npz"
LAYOUT = "--prefix-image photo.png"


@pytest.mark.parametrize(
    "mode, ignored",
    [
        (SAVE_BUNDLE, "--num 2"),
        (SAVE_BUNDLE, "--npz x.npz"),
        (RECONSTRUCT, "--classes c1"),
        (RECONSTRUCT, "--cfg 1 6"),
        (RECONSTRUCT, "--top-p 0.9"),
        (RECONSTRUCT, "--balanced"),
        (RECONSTRUCT, "--out x.png"),
        (RECONSTRUCT, "--prefix-image photo.png"),
        ("--npz x.npz", "--out x.png"),
        ("--folder x", "--trajectory"),
        ("--npz x.npz", "--prefix-tokens 8"),
        (LAYOUT, "--prefix-seed 0"),
        (LAYOUT, "--balanced"),
    ],
)
def test_option_that_a_mode_would_ignore(mode, ignored):
    args = sample.parse_arguments([*mode.split(), *ignored.split()])
    message = f"^{ignored.split()[0]} has no effect with {mode.split()[0]}$"
    with pytest.raises(ValueError, match=message):
        sample.check_arguments(args)


@pytest.mark.parametrize(
    "words, others",
    [
        ("--prefix-tokens 8", "--prefix-image or --prefix-class"),
        ("--prefix-seed 0", "--prefix-class"),
        ("--balanced", "--npz or --folder"),
    ],
)
def test_option_of_a_mode_that_is_not_asked_for(draw, words, others):
    with pytest.raises(ValueError, match=f"^{words.split()[0]} has no effect without {others}$"):
        draw(words)


def test_every_option_belongs_to_a_mode():
    belongs = " ".join([*sample.MODES, *sample.MODES.values(), sample.ALL]).split()
    assert set(belongs) == set(vars(sample.parse_arguments([])))


def test_two_sets_in_one_file(draw, tmp_path):
    with pytest.raises(ValueError, match="--npz and --reference-npz are one file, x.npz"):
        draw("--reconstruct . --npz x.npz --reference-npz", tmp_path / "x.npz")
