"""Both trainings, as whoever runs them sees them: what comes out; that a step is the lesson's, for
any number of processes and micro-batches; that a run goes on as if it had never stopped."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_lines import (
    AR,
    BASELINE,
    SMALL_FIELDS,
    TOKENIZER,
    assert_same_run,
    call,
    log,
    losses,
    run,
)
from PIL import Image

import dar
import train_ar
import train_tokenizer
from common import training
from common.distributed import Processes
from common.images import center_crop, psnr, to_float
from common.training import ImageData, LossScaler, Samples

CPU = torch.device("cpu")
ALONE = Processes(CPU)


@pytest.fixture(scope="module")
def start(tmp_path_factory, random_weights) -> dict[str, str]:
    """Files to start from, for --init, whose weights all matter: a tokenizer's and a Llama's."""
    folder = tmp_path_factory.mktemp("start")
    config = dar.dataclasses.replace(dar.TOKENIZER_PRESETS["tiny"], **SMALL_FIELDS)
    tokenizer = random_weights(dar.SequentialDiffusionTokenizer(config))
    dar.save_checkpoint(folder / "tokenizer.pt", tokenizer)
    config = dar.ARConfig(64, 1, vocab_size=64, num_classes=4, num_tokens=16, dropout=0.0)
    ar = random_weights(dar.ARTransformer(config))
    ar.attach_tokenizer(tokenizer)
    dar.save_checkpoint(folder / "ar.pt", ar)
    return {name: str(folder / f"{name}.pt") for name in ("tokenizer", "ar")}


def llama(start) -> list[str]:
    """A training of the Llama on shapes."""
    return [*AR, "--data", "shapes", "--tokenizer", start["tokenizer"]]


# What comes out


def test_tokenizer_run_logs_draws_and_saves(work):
    rows = log(work / "tokenizer")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    for row in rows:
        terms = float(row["fm"]) + float(row["vq"]) + float(row["commit"])
        assert terms == pytest.approx(float(row["loss"]), rel=1e-4)
        assert 0 < float(row["code_use"]) <= 1
        assert float(row["images_per_s"]) > 0
    assert float(rows[-1]["val_psnr"]) > 0
    assert 0 < float(rows[-1]["val_code_use"]) <= 1

    # Eight images: original, previews of the four steps, reconstruction.
    assert Image.open(work / "tokenizer" / "step-4.png").size == (6 * 98 + 2, 8 * 98 + 2)
    tokenizer = dar.load_tokenizer(work / "tokenizer" / "last.pt")
    assert tokenizer.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 16)


def test_llama_run_carries_its_tokenizer(work):
    last = log(work / "ar")[-1]
    groups = [float(last[f"val_group_{k}"]) for k in range(4)]
    assert np.mean(groups) == pytest.approx(float(last["val_loss"]), rel=1e-4)
    assert 0 < float(last["unigram_by_position"]) <= float(last["unigram"]) + 1e-6
    assert Image.open(work / "ar" / "step-5.png").size == (3 * 98 + 2, 4 * 98 + 2)
    ar = dar.load_ar(work / "ar" / "last.pt")
    assert ar.class_names == ["ant", "bee", "cat"]
    assert ar.tokenizer.config.num_tokens == 16


def kept_steps(folder) -> dict[str, int]:
    paths = folder.glob("*.pt")
    return {path.name: dar.read_checkpoint(path)["training"]["step"] for path in paths}


def test_checkpoints_are_kept(work):
    assert kept_steps(work / "tokenizer") == {"last.pt": 4, "step-2.pt": 2, "step-4.pt": 4}


@pytest.mark.parametrize("script", ["tokenizer", "llama"])
def test_checkpoints_are_kept_between_two_saves(start, tmp_path, script):
    words = [*llama(start), "--on-the-fly"] if script == "llama" else TOKENIZER
    call(*words, *"--steps 7 --save-every 3 --keep-every 2 --out run".split(), cwd=tmp_path)
    assert kept_steps(tmp_path / "run") == {
        "last.pt": 7,
        "step-2.pt": 2,
        "step-4.pt": 4,
        "step-6.pt": 6,
    }


def test_start_says_what_was_found_and_what_will_be_done(work, capsys):
    words = "--val shapes --steps 20 --warmup 3 --lr 1e-4 --picture-every 50 --out said"
    call(*BASELINE, *words.split(), cwd=work)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "data: 24 images in 3 classes, ant ... cat",
        "shapes: 1000 drawn images in 4 classes, circle ... star",
        "20 steps of 4 images, rate 0.0001, warm-up 3 steps, codebook warm-up 2 steps",
    ]
    words = "--tokenizer tokenizer/last.pt --epochs 1 --on-the-fly --out said-ar"
    call(*AR, *words.split(), cwd=work)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "data: 24 images in 3 classes, ant ... cat",
        "6 steps of 4 images, rate 0.002",
    ]


# Short runs


@pytest.mark.parametrize("steps, expected", [(5000, 200), (2000, 200), (1999, 199), (24, 2)])
def test_short_run_has_a_short_warm_up(steps, expected):
    args = train_tokenizer.argparse.Namespace(steps=steps, warmup=7, codebook_warmup=None)
    training.fill_in_warmups(args, train_tokenizer.RECIPES["cifar10"])
    assert args.codebook_warmup == expected
    assert args.warmup == 7
    args.warmup = None
    training.fill_in_warmups(args, train_ar.RECIPES["cifar10"])  # has no warm-up of the codebook
    assert args.warmup == min(50, steps // 10)


@pytest.mark.parametrize("recipes", [train_tokenizer.RECIPES, train_ar.RECIPES])
def test_whole_recipe_has_its_own_warm_up(recipes):
    images = {"shapes": 10_000, "B": 1_281_167, "L": 1_281_167, "XL": 1_281_167}
    for name, recipe in recipes.items():
        steps = recipe.get("steps")
        if steps is None:
            steps = int(recipe["epochs"] * images.get(name, 50_000) / recipe["batch"])
        args = train_tokenizer.argparse.Namespace(steps=steps, warmup=None, codebook_warmup=None)
        training.fill_in_warmups(args, recipe)
        assert args.warmup == recipe["warmup"]
        assert args.codebook_warmup == recipe.get("codebook_warmup")


def test_longer_run_keeps_the_warm_up_that_it_began_with(tmp_path):
    words = [*TOKENIZER, *"--out run --steps".split()]
    call(*words, 20, cwd=tmp_path)
    call(*words, 40, cwd=tmp_path)
    settings = dar.read_checkpoint(tmp_path / "run" / "last.pt")["training"]["settings"]
    assert settings["codebook_warmup"] == 2
    with pytest.raises(ValueError, match="codebook_warmup was 2, is 4"):
        call(*words, 60, "--codebook-warmup", 4, cwd=tmp_path)


@pytest.mark.slow
def test_shapes_recipe_learns(tmp_path):
    """The first minute of the README's tour, each command as the one before says it."""
    words = "--preset shapes --data shapes --val shapes --device cpu --log-every 20 --steps 60"
    words += " --codebook-warmup 30 --picture-every 30 --out my/shapes"
    done = run("train_tokenizer.py", *words.split(), cwd=tmp_path)
    rows = log(tmp_path / "my" / "shapes")
    errors = [float(row["fm"]) for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]
    first, last = (Image.open(tmp_path / f"my/shapes/step-{step}.png") for step in (30, 60))
    assert first.size == last.size
    assert first.tobytes() != last.tobytes()

    following = done.stderr.splitlines()[-1].split("next: python ")[1].split()
    assert following[:3] == ["train_ar.py", "--data", "shapes"]
    words = "--device cpu --steps 40 --log-every 20 --picture-every 40"
    done = run(*following, *words.split(), cwd=tmp_path)
    first, last = (float(row["loss"]) for row in log(tmp_path / "my" / "shapes-ar"))
    assert last < 0.85 * first

    following = done.stderr.splitlines()[-1].split("next: python ")[1].split()
    run(*following, cwd=tmp_path)
    assert (tmp_path / "samples.png").exists()


@pytest.mark.slow
def test_llama_learns_32_images_by_heart(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer()
    dar.save_checkpoint(tmp_path / "tokenizer.pt", tokenizer)
    pictures = []
    for i in range(32):  # a class each; symmetric, so that image and mirror have the same codes
        colours = np.random.default_rng(i).integers(0, 256, (4, 2, 3)).astype(np.uint8)
        half = colours.repeat(8, 0).repeat(8, 1)
        pictures.append(np.concatenate((half, half[:, ::-1]), 1))
        folder = tmp_path / "data" / f"{i:02}"
        folder.mkdir(parents=True)
        Image.fromarray(pictures[-1]).save(folder / "x.png")
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    codes = tokenizer.encode(to_float(pixels))
    assert len(codes.unique(dim=0)) == 32

    words = "--tokenizer tokenizer.pt --batch 32 --steps 250 --log-every 50 --lr 4e-3 --layers 2"
    call(*AR, *words.split(), *"--class-dropout 0 --out ar".split(), cwd=tmp_path)
    assert float(log(tmp_path / "ar")[-1]["loss"]) < 0.05
    ar = dar.load_ar(tmp_path / "ar" / "last.pt")
    assert torch.equal(ar.generate(torch.arange(32), cfg=None, greedy=True), codes)


def test_row_is_a_mean_over_its_steps(tmp_path):
    words = [*TOKENIZER, *"--steps 6".split()]
    call(*words, "--out", "every", cwd=tmp_path)
    call(*words, *"--out means --log-every 3".split(), cwd=tmp_path)
    every = [float(row["loss"]) for row in log(tmp_path / "every")]
    means = [float(row["loss"]) for row in log(tmp_path / "means")]
    assert means == pytest.approx([np.mean(every[:3]), np.mean(every[3:])], rel=1e-5)


# A step is the lesson's (dar.tokenizer_training_step, dar.ar_training_step)


def assert_same_weights(path, model: torch.nn.Module, part: str = "model") -> None:
    saved = dar.read_checkpoint(path)[part]
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved[name], weight, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("codebook_warmup", [0, 2])
def test_tokenizer_step_is_the_lessons(start, tmp_path, monkeypatch, codebook_warmup):
    words = "--steps 3 --keep-every 2 --times 3 --lr 1e-3 --warmup 0 --decay 0 --out run"
    words = [*words.split(), "--init", start["tokenizer"], "--codebook-warmup", codebook_warmup]
    call(*TOKENIZER, *words, cwd=tmp_path)

    model = dar.load_tokenizer(start["tokenizer"])
    ema = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, (0.9, 0.95), fused=True)
    crop = functools.partial(train_tokenizer.random_crop, size=16, flip=True)
    samples = Samples(ImageData("shapes", 16), crop, seed=0)
    for step in range(2):
        positions = torch.arange(4 * step, 4 * step + 4)
        times = train_tokenizer.draw_times(0, step, 4, 3)
        noise = train_tokenizer.draw_noise(0, positions, (3, 3, 16, 16), CPU)
        code_noise = train_tokenizer.draw_noise(1, positions, (16, 8), CPU)
        with monkeypatch.context() as patch:  # what the lesson draws at random
            patch.setattr(torch, "rand", lambda *_, **__: times)  # noqa: B023
            patch.setattr(torch, "randn", lambda *_, **__: code_noise)  # noqa: B023
            patch.setattr(torch, "randn_like", lambda x: noise.view(x.shape))  # noqa: B023
            images = to_float(torch.stack([samples[int(p)][0] for p in positions]))
            dar.tokenizer_training_step(model, ema, optimizer, images, step, 3, codebook_warmup)
    assert_same_weights(tmp_path / "run" / "step-2.pt", model)
    assert_same_weights(tmp_path / "run" / "step-2.pt", ema, "ema")


def test_llama_step_is_the_lessons(start, tmp_path, monkeypatch):
    words = "--steps 2 --lr 1e-3 --warmup 0 --class-dropout 0.5 --on-the-fly --out run"
    call(*llama(start), *words.split(), "--init", start["ar"], cwd=tmp_path)

    model = dar.load_ar(start["ar"]).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 1e-3, (0.9, 0.95), weight_decay=0.05, fused=True)
    crop = functools.partial(train_ar.one_crop, size=16)
    samples = Samples(ImageData("shapes", 16), crop, seed=0)
    for step in range(2):
        batch = [samples[position] for position in range(4 * step, 4 * step + 4)]
        images = to_float(torch.stack([sample[0] for sample in batch]))
        labels = torch.tensor([sample[1] for sample in batch])
        drawn = torch.where(train_ar.draw_dropped(0, step, 4, 0.5), 0.0, 1.0)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, **__: drawn)  # noqa: B023
            dar.ar_training_step(model, optimizer, images, labels, class_dropout=0.5)
    assert_same_weights(tmp_path / "run" / "last.pt", model)


def moments(folder) -> list[torch.Tensor]:
    """Adam's averages of the gradients, in which every step of the run had a part."""
    optimizer = dar.read_checkpoint(folder / "last.pt")["training"]["optimizer"]
    return [state["exp_avg"] for state in optimizer["state"].values()]


def assert_same_steps(a, b) -> None:
    """Losses to 1e-5, gradients to 1e-4 of the largest: float32 sums in another order."""
    for first, second in zip(log(a), log(b), strict=True):
        for column, tolerance in {"loss": 1e-5, "grad_norm": 1e-4}.items():
            assert float(first[column]) == pytest.approx(float(second[column]), rel=tolerance)
    largest = max(moment.abs().max() for moment in moments(b))
    for first, second in zip(moments(a), moments(b), strict=True):
        assert (first - second).abs().max() <= 1e-4 * largest


def step_words(script: str, start) -> list[str]:
    """Steps of eight images, from weights that all matter."""
    if script == "llama":
        return [*llama(start), *"--batch 8 --steps 4 --on-the-fly --init".split(), start["ar"]]
    words = [*TOKENIZER, *"--batch 8 --steps 4 --times 2 --decay 0 --init".split()]
    if script == "warm-up":
        return [*words, start["tokenizer"], "--codebook-warmup", "1"]
    return [*words, start["tokenizer"]]


@pytest.mark.parametrize("script", ["tokenizer", "warm-up", "llama"])
def test_micro_batches_take_the_whole_step(start, tmp_path, script):
    words = [*step_words(script, start), "--steps", "2"]
    call(*words, "--out", "whole", cwd=tmp_path)
    call(*words, *"--out parts --micro-batch 2".split(), cwd=tmp_path)
    assert_same_steps(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["tokenizer", "llama"])
def test_processes_take_the_same_steps(start, tmp_path, script):
    """A run goes on in two processes that take single images, measures together what is held out,
    and ends as if one process had taken all its steps."""
    words = [*step_words(script, start), *"--save-every 2 --val shapes --warmup 0".split()]
    call(*words, "--out", "one", cwd=tmp_path)
    call(*words, *"--out many --steps 2".split(), cwd=tmp_path)
    run(*words, *"--out many --micro-batch 1".split(), cwd=tmp_path, processes=2)
    assert_same_steps(tmp_path / "many", tmp_path / "one")
    one, many = (log(tmp_path / name)[-1] for name in ("one", "many"))
    for column in one:
        if column.startswith("val_"):
            assert float(many[column]) == pytest.approx(float(one[column]), rel=1e-3)


# A run goes on as if it had never stopped


class Killed(BaseException):
    pass


@pytest.fixture
def call_until(monkeypatch):
    """A function that runs a script until so many steps are done, and leaves it in the next."""

    def call_until(steps: int, *words, cwd) -> None:
        accept = LossScaler.accept

        def accept_or_die(self, numbers, step):
            if step == steps:
                raise Killed
            return accept(self, numbers, step)

        with monkeypatch.context() as patch:
            patch.setattr(LossScaler, "accept", accept_or_die)
            with pytest.raises(Killed):
                call(*words, cwd=cwd)

    return call_until


# Rows are means of four steps, files are written after three; quantizing begins with step 6.
STOPPED = [*TOKENIZER, *"--steps 9 --log-every 4 --save-every 3 --codebook-warmup 6".split()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    call(*STOPPED, "--out", "run", cwd=folder)
    assert len(losses(folder / "run")) == 3
    return folder / "run"


@pytest.mark.parametrize("steps", [2, 4, 6, 8])
def test_stopped_run_goes_on_bit_for_bit(whole, tmp_path, call_until, steps):
    call_until(steps, *STOPPED, "--out", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "last.pt").exists() == (steps >= 3)
    call(*STOPPED, "--out", "run", cwd=tmp_path)
    assert_same_run(tmp_path / "run", whole)


def test_stopped_llama_run_goes_on_bit_for_bit(start, tmp_path, call_until):
    words = "--steps 7 --log-every 4 --save-every 3 --dropout 0.1 --ema --on-the-fly --init"
    words = [*llama(start), *words.split(), start["ar"]]
    call(*words, "--out", "whole", cwd=tmp_path)
    call_until(5, *words, "--out", "stopped", cwd=tmp_path)
    call(*words, "--out", "stopped", cwd=tmp_path)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


OTHER = {
    "--seed 5": "seed was 0, is 5",
    "--batch 8": "batch was 4, is 8",
    "--times 3": "times was 2, is 3",
    "--data data": "data was shapes",
    "--codebook-warmup 1": "codebook_warmup was 6, is 1",
    "--set image_size=32": "model image_size was 16, is 32",
}


@pytest.mark.parametrize("change", OTHER)
def test_other_settings_are_another_run(whole, work, change):
    named = OTHER[change]
    words = [*STOPPED, "--out", whole, *change.split()]
    with pytest.raises(ValueError, match=f"last.pt: another run .*{named}.*--resume never"):
        call(*words, cwd=work)


def test_resume_never_starts_anew(tmp_path):
    words = [*TOKENIZER, *"--out run --resume never --steps".split()]
    call(*words, 3, cwd=tmp_path)
    call(*words, 2, "--seed", 1, cwd=tmp_path)
    assert [row["step"] for row in log(tmp_path / "run")] == ["1", "2"]


def test_other_arguments_are_obeyed(start, tmp_path):
    words = [*llama(start), *"--on-the-fly --warmup 0 --out run".split()]
    call(*words, *"--steps 2 --weight-decay 0.1".split(), cwd=tmp_path)
    changed = "--steps 3 --weight-decay 0.25 --lr 0.5 --precision float16 --micro-batch 2"
    call(*words, *changed.split(), cwd=tmp_path)
    saved = dar.read_checkpoint(tmp_path / "run" / "last.pt")["training"]
    assert saved["step"] == 3
    assert [group["weight_decay"] for group in saved["optimizer"]["param_groups"]] == [0.25, 0]
    assert log(tmp_path / "run")[-1]["lr"] == "0.5"
    assert saved["scaler"]["enabled"]
    assert saved["scaler"]["scale"] > 2**10  # not the float32 run's, which was 1


# Precision and memory


def curve(folder) -> np.ndarray:
    return np.array([float(row["loss"]) for row in log(folder)])


@pytest.mark.slow
def test_bfloat16_and_float16_follow_float32(tmp_path):
    words = [*TOKENIZER, *"--steps 30 --warmup 1 --lr 1e-3 --codebook-warmup 0".split()]
    call(*words, "--out", "float32", cwd=tmp_path)
    expected = curve(tmp_path / "float32")
    assert expected[-5:].mean() < 0.9 * expected[0]
    for precision in ("bfloat16", "float16"):
        call(*words, "--out", precision, "--precision", precision, cwd=tmp_path)
        found = curve(tmp_path / precision)
        assert not np.array_equal(found, expected)
        assert np.abs(found / expected - 1).max() < 0.05


def test_recomputation_changes_memory_alone(tmp_path):
    words = [*TOKENIZER, *"--steps 3 --times 2".split()]
    stored = {}
    for out, more in {"stored": [], "recomputed": ["--checkpoint-blocks"]}.items():
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())  # noqa: B023
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call(*words, *more, "--out", out, cwd=tmp_path)
        stored[out] = sum(sizes)
    assert_same_run(tmp_path / "recomputed", tmp_path / "stored")
    assert stored["recomputed"] < 0.6 * stored["stored"]


@pytest.mark.slow
def test_compiled_trainings_follow_the_others(work):
    run(*BASELINE, *"--out compiled --compile".split(), cwd=work)
    words = "--tokenizer tokenizer/last.pt --out ar-compiled --steps 5 --ema --compile"
    run(*AR, *words.split(), cwd=work)
    for compiled, plain in {"compiled": "tokenizer", "ar-compiled": "ar"}.items():
        assert curve(work / compiled) == pytest.approx(curve(work / plain), rel=1e-3)


@pytest.mark.slow
def test_worker_processes_change_nothing(work):
    run(*BASELINE, *"--out helped --workers 2".split(), cwd=work)
    assert losses(work / "helped") == losses(work / "tokenizer")


# What is drawn at random, and in which order


def test_every_epoch_takes_every_image_once():
    epochs = [
        [training.data_index(p, 50, seed=3) for p in range(50 * e, 50 * e + 50)] for e in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [training.data_index(p, 50, seed=4) for p in range(50)]


@pytest.mark.parametrize("world, micro_batch", [(1, 12), (1, 3), (2, 6), (3, 2), (4, 1)])
def test_processes_share_the_samples_of_a_step(world, micro_batch):
    ranks = [
        list(training.sample_numbers(range(5, 7), 12, micro_batch, rank, world))
        for rank in range(world)
    ]
    half = len(ranks[0]) // 2  # a process's micro-batches of the first of the two steps
    first = [number for numbers in ranks for part in numbers[:half] for number in part]
    second = [number for numbers in ranks for part in numbers[half:] for number in part]
    assert sorted(first) == list(range(60, 72))
    assert sorted(second) == list(range(72, 84))
    assert {len(part) for numbers in ranks for part in numbers} == {micro_batch}


def test_a_samples_noise_is_its_own():
    draw = train_tokenizer.draw_noise
    together = draw(1, torch.arange(8), (3, 4, 4), CPU)
    assert torch.equal(draw(1, torch.tensor([6, 5]), (3, 4, 4), CPU), together[[6, 5]])
    assert not torch.equal(together[5], together[6])
    assert not torch.equal(together, draw(2, torch.arange(8), (3, 4, 4), CPU))
    assert together.std() == pytest.approx(1, abs=0.2)
    assert draw(2**31, torch.tensor([2**40]), (2,), CPU).isfinite().all()  # the largest seed + 1


@pytest.mark.parametrize(
    "draw",
    [
        lambda seed, step: train_tokenizer.draw_times(seed, step, 500, 4) < 0.1,
        lambda seed, step: train_ar.draw_dropped(seed, step, 2000, 0.1),
    ],
)
def test_times_follow_from_seed_and_step(draw):
    assert draw(0, 7).float().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(draw(0, 7), draw(0, 7))
    assert not torch.equal(draw(0, 7), draw(0, 8))
    assert not torch.equal(draw(0, 7), draw(1, 7))


def test_rates_by_hand():
    args = train_tokenizer.argparse.Namespace(lr=1.0, warmup=4, steps=20, decay=0.5)
    rates = [train_tokenizer.learning_rate(step, args) for step in (0, 1, 3, 5, 10, 15, 19)]
    assert rates == pytest.approx([0.25, 0.5, 1, 1, 1, 0.5, 0.1])
    args = train_ar.argparse.Namespace(lr=1.0, warmup=0, steps=600)
    rates = [train_ar.learning_rate(step, args) for step in (0, 499, 550, 599)]
    assert rates == pytest.approx([1, 1, 0.500005, 0.01 + 0.99e-5])
    args.lr = 1e-6
    assert train_ar.learning_rate(599, args) == pytest.approx(1e-6)


def test_codebook_starts_as_features_of_coming_images(make_tokenizer):
    model = make_tokenizer()
    ema = make_tokenizer(seed=2)
    samples = Samples(ImageData("shapes", 32), lambda image, rng: image, seed=0)
    train_tokenizer.start_codebook(model, ema, samples, 40, CPU)
    images = to_float(torch.stack([samples[40 + i][0] for i in range(9)]))  # for 64 codes
    features = F.normalize(model.encoder(images), dim=-1).flatten(0, 1)
    codebook = model.quantize.embedding.weight
    same = torch.isclose(codebook[:, None], features, atol=1e-5).all(-1)  # [64, 9 * 32]
    chosen = same.int().argmax(1)
    assert same.any(1).all()
    assert len(chosen.unique()) > 60
    assert not torch.equal(chosen, chosen.sort().values)  # in no order
    assert torch.equal(ema.quantize.embedding.weight, codebook)


# Data


def draw(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        training.draw_shape(len(name), 16).save(folder / name)


def test_shapes_follow_from_their_number():
    data = ImageData("shapes", 32)
    assert data.labels[:5].tolist() == [0, 1, 2, 3, 0]
    pixels = [np.array(data.image(i)) for i in range(200)]
    assert np.array_equal(pixels[11], np.array(ImageData("shapes", 32).image(11)))
    held_out = ImageData("shapes", 32, held_out=True)
    assert not np.array_equal(pixels[11], np.array(held_out.image(11)))
    # Each shape in each colour.
    assert len({(data.labels[i], *pixels[i][16, 16]) for i in range(200)}) == 4 * 8


def test_a_folder_is_a_class(tmp_path):
    draw(tmp_path, "zebra/0.png", "zebra/deep/er.png", "ant/1.png", "ant/0.png")
    data = ImageData(str(tmp_path), 8)
    assert data.class_names == ["ant", "zebra"]
    assert data.labels.tolist() == [0, 0, 1, 1]
    expected = np.array(training.draw_shape(len("zebra/deep/er.png"), 16))
    assert np.array_equal(np.array(data.image(3)), expected)

    draw(tmp_path, "ant/2.png")
    assert ImageData(str(tmp_path), 8).digest != data.digest
    (tmp_path / "ant" / "2.png").unlink()
    assert ImageData(str(tmp_path), 8).digest == data.digest
    with open(tmp_path / "ant" / "1.png", "ab") as file:
        file.write(b"another picture of the same name")
    assert ImageData(str(tmp_path), 8).digest != data.digest
    draw(tmp_path, "flat.png")
    with pytest.raises(ValueError, match="flat.png: expected a sub-folder"):
        ImageData(str(tmp_path), 8)


def test_parts_of_a_dataset_are_no_classes(tmp_path):
    draw(tmp_path, "train/ant/1.png", "val/ant/1.png", "test/ant/1.png")
    with pytest.raises(ValueError, match="test, train, val are no classes; take one, as .*/train"):
        ImageData(str(tmp_path), 8)
    assert ImageData(str(tmp_path / "train"), 8).describe().endswith("1 images in one class, ant")
    draw(tmp_path, "plane/1.png")  # a collection of vehicles
    assert ImageData(str(tmp_path), 8).class_names == ["plane", "test", "train", "val"]


def test_crops_are_random_squares_and_mirrors():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (90, 140, 3), dtype=np.uint8))
    crop = functools.partial(train_tokenizer.random_crop, image, size=64)
    crops = [np.array(crop(np.random.default_rng(i), flip=False)) for i in range(8)]
    assert {picture.shape for picture in crops} == {(64, 64, 3)}
    assert len({picture.tobytes() for picture in crops}) == 8
    assert np.array_equal(np.array(crop(np.random.default_rng(3), flip=False)), crops[3])

    small = training.draw_shape(1, 32).transpose(Image.ROTATE_90)
    views = [
        np.array(train_tokenizer.random_crop(small, np.random.default_rng(i), 32, flip=True))
        for i in range(20)
    ]
    mirrored = [np.array_equal(view, np.array(small)[:, ::-1]) for view in views]
    assert 5 < sum(mirrored) < 15
    assert sum(np.array_equal(view, np.array(small)) for view in views) == 20 - sum(mirrored)


@pytest.mark.parametrize("classes, members", [(4, 250), (3, 5), (10, 3), (2, 1)])
def test_reconstruction_picture_shows_every_class(classes, members, small_tokenizer, monkeypatch):
    data = ImageData("shapes", 32)
    data.labels = np.arange(classes * members) % classes
    shown = []
    next_readable = data.next_readable
    monkeypatch.setattr(data, "next_readable", lambda i: shown.append(i) or next_readable(i))
    picture = train_tokenizer.reconstruction_picture(small_tokenizer, data, CPU)
    assert len(set(shown)) == len(shown) == min(8, len(data))
    assert picture.height == 98 * len(shown) + 2
    assert len(set(data.labels[shown])) == min(8, classes)


# The Llama's codes


@pytest.mark.parametrize("size", [64, 100, 256])
def test_ten_crops_are_torchvisions(size):
    from torchvision.transforms import TenCrop

    noise = np.random.default_rng(0).integers(0, 256, (330, 300, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = TenCrop(size)(center_crop(image, int(1.1 * size)))
    found = train_ar.ten_crops(image, size)
    assert [crop.tobytes() for crop in found] == [crop.tobytes() for crop in expected]


def test_small_images_give_themselves_and_their_mirror():
    image = training.draw_shape(3, 32)
    whole, mirror = (np.array(view) for view in train_ar.ten_crops(image, 32))
    assert np.array_equal(whole, np.array(image))
    assert np.array_equal(mirror, whole[:, ::-1])


def first_shapes(count: int) -> ImageData:
    data = ImageData("shapes", 32)
    data.labels = data.labels[:count]
    return data


@pytest.mark.parametrize("size, dtype", [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_codes_of_any_codebook_are_kept_whole(make_tokenizer, tmp_path, size, dtype):
    tokenizer = make_tokenizer(codebook_size=size)
    codes, sources = train_ar.tokenize(tokenizer, first_shapes(20), tmp_path / "c", True, ALONE)
    images = train_tokenizer.load_crops(first_shapes(20), range(20))
    expected = tokenizer.encode(images)
    assert codes.dtype == dtype
    assert np.array_equal(codes[:, 0], expected.numpy())
    assert expected.max() > 2**15
    assert sources.tolist() == list(range(20))


def test_codes_made_on_the_fly_train_the_same(work):
    words = "--tokenizer tokenizer/last.pt --steps 5 --ema --on-the-fly --out fly"
    call(*AR, *words.split(), cwd=work)
    assert (work / "ar" / "codes" / "codes.npy").exists()
    assert not (work / "fly" / "codes").exists()
    assert losses(work / "fly") == losses(work / "ar")


# What is measured


def test_reconstruction_is_measured_on_held_out_images(small_tokenizer):
    data = ImageData("shapes", 32, held_out=True)
    autocast = torch.autocast("cpu", enabled=False)
    found = train_tokenizer.held_out(small_tokenizer, data, 60, ALONE, autocast)
    chosen = np.random.default_rng(0).permutation(1000)[:60].tolist()
    images = train_tokenizer.load_crops(data, chosen)
    codes = small_tokenizer.encode(images)
    decoded = small_tokenizer.decode(codes, dar.initial_noise(chosen, 32, CPU))
    assert found["val_psnr"] == pytest.approx(psnr(decoded, images).mean().item(), rel=1e-4)
    assert found["val_code_use"] == pytest.approx(len(codes.unique()) / 64)


def test_held_out_losses_by_hand(make_ar, make_tokenizer):
    ar = make_ar()
    ar.attach_tokenizer(make_tokenizer())
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 64, (300, 32)).astype(np.uint16)
    labels = rng.integers(0, 10, 300)
    autocast = torch.autocast("cpu", enabled=False)
    found = train_ar.held_out(ar, codes, labels, ALONE, autocast)
    tokens = torch.from_numpy(codes.astype(np.int64))
    shuffled = labels[np.random.default_rng(0).permutation(300)]

    @torch.no_grad()
    def nats(classes: np.ndarray) -> torch.Tensor:
        log_p = ar(tokens[:, :-1], torch.from_numpy(classes)).log_softmax(-1)
        return -log_p.gather(-1, tokens[..., None])[..., 0].mean(0)  # [32]

    assert found["val_loss"] == pytest.approx(nats(labels).mean().item(), rel=1e-5)
    assert found["val_shuffled"] == pytest.approx(nats(shuffled).mean().item(), rel=1e-5)
    groups = [found[f"val_group_{k}"] for k in range(8)]
    assert groups == pytest.approx(nats(labels).view(8, 4).mean(1).tolist(), rel=1e-5)


def test_entropies_by_hand():
    codes = np.array([[[0, 2]], [[0, 3]], [[1, 2]], [[1, 3]]], np.uint16)  # 4 images, a crop each
    found = train_ar.unigram_entropies(codes, 4)
    assert found["unigram"] == pytest.approx(math.log(4))
    assert found["unigram_by_position"] == pytest.approx(math.log(2))


# --init, gradients


@pytest.fixture(scope="module")
def shipped() -> str:
    """The model of this repository: a Llama that carries its tokenizer."""
    return str(train_ar.Path(dar.__file__).parent / "checkpoints" / "cifar10.pt")


def test_init_takes_a_tokenizer_and_any_time_shift(shipped):
    first = dar.load_tokenizer(shipped, dtype=torch.float32)
    args = train_tokenizer.argparse.Namespace(init=shipped, seed=0, repa=0, resume="never")
    config = dar.dataclasses.replace(first.config, time_shift=9.0)
    found = train_tokenizer.build_model(args, config)
    assert found.config.time_shift == 9
    assert torch.equal(found.patchify.weight, first.patchify.weight)
    config = dar.dataclasses.replace(config, code_dim=7, num_tokens=32)
    expected = "cifar10.pt: has num_tokens = 64, this run 32; code_dim = 8, this run 7"
    with pytest.raises(ValueError, match=expected):
        train_tokenizer.build_model(args, config)


def test_init_takes_a_llama_of_the_same_shape(shipped):
    first = dar.load_ar(shipped, dtype=torch.float32)
    args = dict(preset="cifar10", init=shipped, seed=0, width=None, layers=None, dropout=0.25)
    args = train_ar.argparse.Namespace(**args, resume="never")
    names = list("abcdefghij")
    found = train_ar.build_model(args, first.tokenizer, names)
    assert found.config.dropout == 0.25
    assert found.class_names == names
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, found.state_dict()[name])
    args.width = 128
    args.layers = 2
    with pytest.raises(ValueError) as refused:
        train_ar.build_model(args, first.tokenizer, names)
    assert str(refused.value) == (
        f"--init {shipped}: has width = 256, this run 128; layers = 5, this run 2"
    )


def test_init_with_other_classes_starts_them_as_no_class(shipped, capsys):
    first = dar.load_ar(shipped, dtype=torch.float32)
    args = dict(preset="cifar10", init=shipped, seed=0, width=None, layers=None, dropout=0.0)
    args = train_ar.argparse.Namespace(**args, resume="never")
    found = train_ar.build_model(args, first.tokenizer, ["ant", "bee", "cat"])
    assert found.config.num_classes == 3
    for name, weight in found.state_dict().items():
        expected = first.state_dict()[name]
        if name == "cls_embedding.weight":
            expected = expected[-1:].repeat(4, 1)
        assert torch.equal(weight, expected)
    assert capsys.readouterr().err == (
        f'--init {shipped}: has 10 classes, this run 3: each starts as its "no class"\n'
    )


def test_init_of_a_run_with_other_classes(start, work):
    words = [*AR, *"--tokenizer tokenizer/last.pt --steps 2 --on-the-fly --out fine --init".split()]
    call(*words, start["ar"], cwd=work)
    assert dar.load_ar(work / "fine" / "last.pt").class_names == ["ant", "bee", "cat"]
    assert len(log(work / "fine")) == 2


def test_gradients_are_clipped_to_a_norm():
    for clip, expected in {0: 5.0, 1: 1.0, 7: 5.0}.items():
        model = torch.nn.Linear(2, 1, bias=False)
        model.weight.grad = torch.tensor([[30.0, 40.0]])
        assert training.clip_gradients(model, scale=10.0, clip=clip) == pytest.approx(5)
        assert model.weight.grad.norm() == pytest.approx(expected, rel=1e-4)


def test_loss_scale_halves_on_overflow_and_doubles_later():
    scaler = LossScaler(True)
    good = {"loss": 1.0, "grad_norm": 2.0}
    for step in range(1999):
        assert scaler.accept(good, step)
    assert scaler.scale == 65536
    assert scaler.accept(good, 1999)
    assert scaler.scale == 131072
    assert not scaler.accept(good | {"grad_norm": math.inf}, 2000)
    assert scaler.scale == 65536
    assert scaler.skipped == 1
    scaler.scale = 1e-4  # which nothing can overflow
    with pytest.raises(FloatingPointError, match="step 2002: not finite .loss 1, grad_norm nan"):
        scaler.accept(good | {"grad_norm": math.nan}, 2001)
