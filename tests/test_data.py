"""training.py in one process: data, averages, the loss scale, arguments, and a run that is stopped and goes on."""

import copy
import dataclasses
import itertools
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import log, losses
from PIL import Image, ImageColor
from torch import nn

import dar
import train_ar
import train_tokenizer
import training

# Data


def test_shapes_depend_on_their_index_alone():
    first, again = (training.ImageData("shapes", 32) for _ in range(2))
    assert np.array_equal(first.image(11), again.image(11)) and not np.array_equal(first.image(11), again.image(16))
    assert not np.array_equal(first.image(11), training.ImageData("shapes", 32, held_out=True).image(11))
    assert first.class_names == list(training.SHAPES) and set(first.labels) == set(range(len(training.SHAPES)))


def test_shapes_are_upright_centred_of_eight_colours_on_white():
    seen = set()
    for i in range(200):
        name, pixels = list(training.SHAPES)[i % len(training.SHAPES)], np.array(training.draw_shape(i, 32))
        inside = (pixels != 255).any(-1)
        columns = np.flatnonzero(inside.any(0))
        assert not inside[[0, 0, -1, -1], [0, -1, 0, -1]].any() and abs(columns[0] + columns[-1] - 31) <= 1
        colour = tuple(pixels[16, 16].tolist())
        seen.add((name, colour))
        top = np.flatnonzero(inside[inside.any(1)][0])  # a corner points up, or it is much the same upside down
        pointed = len(top) <= 4 and abs(top.mean() - 15.5) <= 1
        assert pointed if name in ("triangle", "star") else (inside != inside[::-1]).sum() < 10, name
    palette = {ImageColor.getrgb(colour) for colour in training.COLOURS}
    assert len(palette) == 8 and seen == set(itertools.product(training.SHAPES, palette))


def test_each_shape_covers_its_share_of_the_square_around_it():
    full = {name: [] for name in training.SHAPES}  # shares of the square around the shape that it covers
    for i in range(80):
        inside = (np.array(training.draw_shape(i, 64)) != 255).any(-1)
        sides = np.ptp(np.flatnonzero(inside.any(0))) + 1, np.ptp(np.flatnonzero(inside.any(1))) + 1
        full[list(training.SHAPES)[i % 4]].append(inside.sum() / np.prod(sides))
    expected = {"circle": np.pi / 4, "triangle": 0.5, "square": 1.0, "star": 0.4}
    for name, shares in full.items():
        assert np.allclose(shares, expected[name], atol=0.06), name


@pytest.mark.parametrize("classes, members", [(4, 250), (4, 2500), (3, 5), (10, 3), (1, 9), (8, 1), (2, 1)])
def test_the_reconstruction_picture_shows_every_class(classes, members, small_tokenizer, monkeypatch):
    data, shown = training.ImageData("shapes", 32), []
    data.labels = np.arange(classes * members) % classes  # classes in turn, as in "shapes"
    load_crops = train_tokenizer.load_crops
    monkeypatch.setattr(train_tokenizer, "load_crops", lambda d, i: load_crops(d, shown.extend(i) or shown))
    picture = train_tokenizer.reconstruction_picture(small_tokenizer, data, torch.device("cpu"))
    assert len(set(shown)) == len(shown) == min(8, len(data)) and picture.height == 34 * len(shown) + 2
    assert len(set(data.labels[shown])) == min(8, classes)


def draw(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        training.draw_shape(len(name), 16).save(folder / name)


def test_a_folder_a_class_gives_sorted_names_and_labels(tmp_path):
    draw(tmp_path, "zebra/0.png", "zebra/deep/er.png", "ant/1.png", "ant/0.png")
    data = training.ImageData(str(tmp_path), 8)
    assert data.class_names == ["ant", "zebra"] and data.labels.tolist() == [0, 0, 1, 1]
    assert [os.fsdecode(name) for name in data.names] == ["ant/0.png", "ant/1.png", "zebra/0.png", "zebra/deep/er.png"]


def test_missing_empty_and_flat_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        training.ImageData(str(tmp_path / "nowhere"), 8)
    with pytest.raises(ValueError, match="no images"):
        training.ImageData(str(tmp_path), 8)
    draw(tmp_path, "flat.png")
    with pytest.raises(ValueError, match="flat.png: expected a sub-folder"):
        training.ImageData(str(tmp_path), 8)


def test_another_list_of_images_is_other_data(tmp_path):
    draw(tmp_path, "ant/0.png", "bee/0.png")
    before = training.ImageData(str(tmp_path), 8).digest
    assert training.ImageData(str(tmp_path), 8).digest == before
    draw(tmp_path, "bee/1.png")
    assert training.ImageData(str(tmp_path), 8).digest != before


def test_images_that_were_read_take_no_memory(tmp_path):
    draw(tmp_path, "ant/0.png", "ant/1.png")
    data = training.ImageData(str(tmp_path), 16)
    before = pickle.dumps(data)
    assert data.image(0).size == data.image(1).size == (16, 16)
    assert pickle.dumps(data) == before and len(before) < 2000


def test_a_corrupt_image_is_skipped_and_its_label_with_it(tmp_path, capsys):
    draw(tmp_path, "ant/0.png", "ant/1.png", "bee/0.png")
    (tmp_path / "ant" / "1.png").write_bytes(b"no picture")
    data = training.ImageData(str(tmp_path), 16)
    samples = training.Samples(data, lambda image, rng: image, seed=0)
    found = {training.data_index(p, 3, 0): samples[p] for p in range(3)}
    assert "1.png" in capsys.readouterr().err
    assert [found[i][1] for i in range(3)] == [0, 1, 1] and [found[i][3] for i in range(3)] == [0, 1, 0]
    assert torch.equal(found[1][0], found[2][0])
    with pytest.raises(ValueError, match="1 unreadable"):
        data.refuse_if_corrupt(1, 3)
    data.refuse_if_corrupt(1, 100)


def test_every_epoch_visits_every_image_once_in_another_order():
    epochs = [[training.data_index(p, 50, seed=3) for p in range(e * 50, e * 50 + 50)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50)) and epochs[0] != epochs[1]
    assert epochs[0] != [training.data_index(p, 50, seed=4) for p in range(50)]


# Averages, loss scale, arguments


def test_ema_follows_its_formula_for_100_steps():
    model = nn.Linear(3, 2)
    ema, expected = training.EMA(model), model.weight.detach().double()
    for i in range(100):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(model, i)
        decay = min(0.999, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    assert torch.allclose(ema.model.weight.double(), expected, atol=1e-5)
    assert not ema.model.training and not ema.model.weight.requires_grad


def test_the_average_of_a_llama_shares_its_tokenizer(make_ar, small_tokenizer):
    ar = make_ar()
    ar.attach_tokenizer(small_tokenizer)
    assert training.EMA(ar).model.tokenizer is small_tokenizer


def test_the_loss_scale_doubles_after_2000_good_steps():
    scaler = training.LossScaler(True)
    for _ in range(1999):
        scaler.update(True)
    assert scaler.scale == 65536
    scaler.update(True)
    assert scaler.scale == 131072
    scaler.update(False)
    assert scaler.scale == 65536 and scaler.skipped == 1


@pytest.mark.parametrize("script", [train_ar, train_tokenizer])
def test_every_argument_is_explained_and_checked(script):
    fields = {field.name: field for field in dataclasses.fields(script.Arguments)}
    assert all(len(field.metadata["words"]["help"]) > 10 for field in fields.values())

    def check(**changes):
        needed = dict(data="d", out="o") | ({"tokenizer": "t"} if script is train_ar else {})
        args = script.Arguments(**needed | changes)
        training.check_arguments(args, script.RECIPES["tiny"])
        return args

    assert check().lr == script.RECIPES["tiny"]["lr"] and check(lr=1.0).lr == 1.0
    assert check(seed=2**31 - 1).seed == 2**31 - 1
    for name, nothing in itertools.product(("data", "out"), (None, "")):
        with pytest.raises(ValueError, match=f"--{name} is missing"):
            check(**{name: nothing})
    wrong = dict(steps=0, batch=0, micro_batch=0, lr=-1.0, warmup=-1, clip=-0.1, workers=-1, log_every=0, keep_every=-1)
    wrong |= dict(lr=float("inf"), clip=float("nan"), steps=10**400, workers=257)
    more = {train_ar: dict(epochs=0.0, class_dropout=1.5, dropout=-0.1, layers=0, width=0, weight_decay=-1.0)}
    more[train_tokenizer] = dict(times=0, decay=1.5, lpips=-1.0, repa=float("nan"), codebook_warmup=-1)
    for name, value in [*(wrong | more[script]).items(), ("seed", 2**31), ("seed", -1)]:
        with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} .*: expected"):
            check(**{name: value})


# A run


SAMPLES = training.Samples(training.ImageData("shapes", 8), lambda image, rng: image, seed=0)


def small_run(folder, columns=(), **changes) -> training.TrainingRun:
    """A Llama of one block that learns numbers made of pixels."""
    args = training.Arguments(data="shapes", out=str(folder), steps=4, batch=2, lr=0.01, warmup=0, save_every=2)
    args = dataclasses.replace(args, log_every=1, device="cpu", precision="float32")
    args = dataclasses.replace(args, **{k: v for k, v in changes.items() if k not in ("width", "weight_decay")})
    torch.manual_seed(5)
    config = dar.ARConfig(changes.get("width", 64), 1, vocab_size=8, num_classes=5, num_tokens=4, dropout=0.0)
    model = dar.ARTransformer(config)
    decay = changes.get("weight_decay", 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=decay)
    settings = {f"model {k}": v for k, v in dataclasses.asdict(config).items()}
    processes = dar.Processes(torch.device("cpu"))
    return training.TrainingRun(args, processes, model, training.EMA(model), optimizer, settings, [], columns)


def take_steps(run, until: int = 1000, weight: float = 1.0) -> None:
    """The run's steps; leaves it without a word, as a kill would, when `until` steps are done."""

    def losses(chunk):
        images, labels, _ = chunk
        codes = images.flatten(1)[:, :4].long() % 8
        return {"loss": weight * dar.ar_loss(run.parallel, codes, labels) * (len(labels) / run.share)}

    for step, chunks in run.steps(SAMPLES):
        if step == until:
            return
        run.optimise(losses, chunks, run.args.lr)
        row = run.row()
        if row is not None:
            run.log(row)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 4 steps, saved at 2 and 4."""
    before = {number: signal.getsignal(number) for number in training.STOP_SIGNALS}
    run = small_run(tmp_path_factory.mktemp("trained") / "run")
    take_steps(run)
    for number, handler in before.items():
        signal.signal(number, handler)
    return run


@pytest.fixture
def folder(trained, tmp_path, restore_signals) -> Path:
    """A copy of the finished run's folder."""
    for path in trained.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_run_restores_weights_average_and_optimizer_bit_for_bit(trained, folder):
    again = small_run(folder)
    assert again.step == 4 and same(again.model, trained.model) and same(again.ema.model, trained.ema.model)
    assert not same(again.model, again.ema.model)
    states = zip(trained.optimizer.state.values(), again.optimizer.state.values(), strict=True)
    assert all(torch.equal(a[k], b[k]) for a, b in states for k in ("exp_avg", "exp_avg_sq", "step"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(trained, folder, damage):
    last = folder / "last.pt"
    data = last.read_bytes()
    last.unlink()  # as after a kill between the two renames of a save
    if damage != "missing":
        last.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    run = small_run(folder)
    assert run.step == 2
    take_steps(run)
    assert losses(folder) == losses(trained.folder) and same(run.model, trained.model)
    for path in (last, folder / "previous.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="last.pt: damaged.*previous.pt: damaged.*--resume never"):
        small_run(folder)


@pytest.mark.parametrize("stop", [3, 5, 6, 7])
def test_a_row_of_the_log_is_a_mean_over_its_steps_also_across_a_stop(tmp_path, restore_signals, stop):
    settings = dict(steps=8, log_every=4, save_every=3)
    take_steps(small_run(tmp_path / "whole", **settings))
    take_steps(small_run(tmp_path / "stopped", **settings), until=stop)
    run = small_run(tmp_path / "stopped", **settings)
    assert run.step == stop // 3 * 3
    take_steps(run)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 2
    every = small_run(tmp_path / "every", steps=8)
    take_steps(every)
    rows = [float(row["loss"]) for row in log(tmp_path / "every")]
    assert float(log(tmp_path / "whole")[1]["loss"]) == pytest.approx(np.mean(rows[4:]), rel=1e-5)


SPREADSHEETS = {
    "semicolons and a byte-order mark": lambda text: b"\xef\xbb\xbf" + text.replace(b",", b";"),
    "no header": lambda text: text.partition(b"\n")[2],
    "other ends of lines": lambda text: text.replace(b"\n", b"\r\n") + b"\r\n",
    "nothing": lambda text: b"",
    "a torn line": lambda text: text + b"\n5,0.12",
    "something else": lambda text: bytes(range(256)) * 8,
}


@pytest.mark.parametrize("change", [*SPREADSHEETS, "no file"])
def test_whatever_was_done_to_the_log_a_run_goes_on(folder, change):
    path = folder / "log.csv"
    text = path.read_bytes()
    path.unlink()
    if change != "no file":
        path.write_bytes(SPREADSHEETS[change](text))
    run = small_run(folder, steps=6)
    take_steps(run)
    assert run.step == 6
    lines = path.read_bytes().splitlines()
    assert lines[-2].startswith(b"5,") and lines[-1].startswith(b"6,")
    assert all(line.count(b",") == text.splitlines()[0].count(b",") for line in lines[-2:])
    if change == "a torn line":
        assert path.read_bytes().startswith(text) and len(log(folder)) == 6


def test_a_run_with_other_settings_is_refused_naming_the_difference(folder):
    with pytest.raises(ValueError, match="last.pt: another run .*seed was 0, is 1.*--resume never"):
        small_run(folder, seed=1)
    with pytest.raises(ValueError, match="model width was 64, is 128"):
        small_run(folder, width=128)
    with pytest.raises(ValueError, match="batch was 2, is 4"):
        small_run(folder, batch=4)
    assert small_run(folder, seed=1, resume="never").step == 0


def test_every_other_argument_that_changes_is_obeyed(trained, folder):
    run = small_run(folder, lr=0.5, weight_decay=0.25, clip=0.125, steps=5, precision="bfloat16", micro_batch=1)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.25]
    take_steps(run, weight=1000.0)
    assert run.step == 5 and run.dtype == torch.bfloat16 and float(log(folder)[-1]["lr"]) == 0.5
    step = (run.model.output.weight - trained.model.output.weight).abs().max()
    assert step > 0.1  # of a rate of 0.5
    scaled = small_run(folder, precision="float16").scaler
    assert scaled.enabled and scaled.scale == 65536


def test_gradients_are_clipped_to_the_norm_or_with_0_not_at_all(tmp_path, restore_signals):
    def norms(clip: float, weight: float) -> tuple[float, float]:
        run = small_run(tmp_path / "clipped", resume="never", clip=clip)
        seen = []
        run.optimizer.step = lambda: seen.append(
            float(nn.utils.get_total_norm([p.grad for p in run.model.parameters()]))
        )
        take_steps(run, until=1, weight=weight)
        return seen[0], float(log(run.folder)[0]["grad_norm"])

    free, logged = norms(0, 1e3)
    assert free == pytest.approx(logged, rel=1e-4) and free > 10
    assert norms(1, 1e3) == (pytest.approx(1, abs=1e-4), pytest.approx(free, rel=1e-4))
    assert norms(1, 1e-3)[0] == pytest.approx(free / 1e6, rel=1e-2)


def test_a_loss_or_a_gradient_that_is_not_finite_reaches_nothing(folder):
    run = small_run(folder, steps=6)
    before = copy.deepcopy(run.model), copy.deepcopy(run.ema.model)
    weight = run.model.output.weight
    bad = {"loss": lambda: weight.sum() * float("inf"), "gradient": lambda: (0 * weight).sum().sqrt()}
    for what, value in bad.items():
        with pytest.raises(FloatingPointError, match="step 5: not finite .loss .*grad_norm (nan|inf)"):
            run.optimise(lambda _: {"loss": value()}, [0], 0.1)  # noqa: B023
        assert same(before[0], run.model) and same(before[1], run.ema.model), what
    with pytest.raises(FloatingPointError, match="loss inf, grad_norm 0"):
        run.optimise(lambda _: {"loss": 0 * weight.sum() + float("inf")}, [0], 0.1)
    assert dar.read_checkpoint(folder / "last.pt")["training"]["step"] == 4


def test_float16_skips_the_steps_that_overflow(tmp_path, restore_signals):
    run = small_run(tmp_path, precision="float16", steps=40)
    run.scaler.scale = 2.0**25
    overflow = [True] * 3 + [False] * 30
    taken = []
    for too_large in overflow:
        before = copy.deepcopy(run.model)
        loss = {"loss": run.model.output.weight.sum() * (float("inf") if too_large else 1.0)}
        run.optimise(lambda _: loss, [0], 1e-3)  # noqa: B023
        taken.append(not same(before, run.model))
    assert taken == [not too_large for too_large in overflow]
    assert run.scaler.skipped == 3 and run.scaler.scale == 2.0**22
    run.scaler.scale = 1e-4
    with pytest.raises(FloatingPointError, match="not finite"):
        run.optimise(lambda _: {"loss": run.model.output.weight.sum() * float("inf")}, [0], 1e-3)


def test_a_signal_ends_the_steps_and_a_second_ctrl_c_does_not_wait(tmp_path, restore_signals, capsys):
    run = small_run(tmp_path)
    for step, _ in run.steps(SAMPLES):
        os.kill(os.getpid(), signal.SIGINT)
        run.optimise(lambda _: {"loss": run.model.output.weight.square().mean()}, [0], 0.1)
        assert step == 0
    assert run.signal == signal.SIGINT and small_run(tmp_path).step == 1
    assert "stopped after step 1, saved" in capsys.readouterr().err
    run.received = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint(folder):
    resource = pytest.importorskip("resource")
    size = (folder / "last.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = small_run(folder, steps=8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="last.pt: cannot be written"):
            take_steps(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(folder.glob("*.tmp"))
    run = small_run(folder, steps=8)
    assert run.step == 4
    take_steps(run)
    assert [row["step"] for row in log(folder)] == [str(i + 1) for i in range(8)]


def test_nothing_that_windows_lacks_is_needed(tmp_path, restore_signals, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it fails
    monkeypatch.setattr(dar, "list_images", lambda source: ["ant/x.png", "bee/y.png"])
    assert training.ImageData("C:\\data", 8).class_names == ["ant", "bee"]
    take_steps(small_run(tmp_path))
    assert log(tmp_path)[-1]["memory_mb"] == ""


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--batch 2 .*1 processes times --micro-batch 3"):
        small_run(tmp_path, micro_batch=3)
    args = training.Arguments(data="shapes", out=str(tmp_path), batch=3)
    with pytest.raises(ValueError, match="--batch 3 .*2 processes times"):
        training.TrainingRun(args, dar.Processes(torch.device("cpu"), 0, 2), nn.Linear(1, 1), None, None, {}, [])
    assert not list(tmp_path.iterdir())


def test_a_picture_is_no_part_of_the_images_per_second(tmp_path, restore_signals, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training.time, "time", lambda: now[0])
    run = small_run(tmp_path, steps=2)
    for _ in run.steps(SAMPLES):
        run.optimise(lambda _: {"loss": run.model.output.weight.square().mean()}, [0], 0.1)
        now[0] += 0.5  # the step
        row = run.row()
        now[0] += 100  # the picture
        run.log(row)
    assert [float(row["images_per_s"]) for row in log(tmp_path)] == [4, 4]


def timed_run(folder, monkeypatch, step_lengths, **changes) -> None:
    """A run whose steps seem to take so many seconds."""
    now = [0.0]
    monkeypatch.setattr(training.time, "time", lambda: now[0])
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    run = small_run(folder, steps=len(step_lengths), **changes)
    for _, seconds in zip(run.steps(SAMPLES), [*step_lengths, 0]):
        run.optimise(lambda _: {"loss": run.model.output.weight.square().mean()}, [0], 0.1)
        now[0] += seconds
        row = run.row()
        if row is not None:
            run.log(row)


SLOWED = {  # threads, seconds of 60 steps, whether it warns
    "another program begins": (2, [1] * 20 + [5] * 40, True),
    "another program was there first": (2, [5] * 7 + [1] + [5, 5, 5, 1] * 13, True),
    "another program comes and goes": (2, ([1] * 10 + [5] * 9 + [1]) * 3, False),
    "one thread": (1, [1] * 20 + [5] * 40, False),
    "pictures": (2, [1, 1, 1, 1, 15] * 12, False),
    "as fast as ever": (2, [1, 1.5] * 30, False),
}


@pytest.mark.parametrize("case", SLOWED)
def test_steps_far_slower_than_the_fastest_are_noticed_once(case, tmp_path, restore_signals, monkeypatch, capsys):
    threads, seconds, warns = SLOWED[case]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    timed_run(tmp_path, monkeypatch, seconds, log_every=10)
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == warns
    for line in said:
        assert "5 s a step, the fastest took 1; " in line and "OMP_NUM_THREADS=1" in line and "PASSIVE" in line


def test_the_last_line_says_where_the_pictures_are_and_what_is_next(tmp_path, restore_signals, capsys):
    run = small_run(tmp_path)
    run.next = "sample.py --ckpt x/last.pt"
    take_steps(run, until=3)
    assert "next:" not in capsys.readouterr().err
    take_steps(run)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"done; pictures: {tmp_path / 'step-*.png'}; next: python sample.py --ckpt x/last.pt"


def test_too_many_corrupt_files_stop_a_run(tmp_path, restore_signals):
    draw(tmp_path, *(f"data/ant/{i:03}.png" for i in range(100)))
    for name in ("007.png", "008.png"):
        (tmp_path / "data" / "ant" / name).write_bytes(b"no picture")
    data = training.ImageData(str(tmp_path / "data"), 16)
    run = small_run(tmp_path / "run", batch=50, log_every=2)
    with pytest.raises(ValueError, match="data: 2 unreadable images, over 1%"):
        for _ in run.steps(training.Samples(data, lambda image, rng: image, seed=0)):
            run.optimise(lambda _: {"loss": run.model.output.weight.square().mean()}, [0], 0.1)
            run.row()
    assert run.step == 1  # found as soon as the log has to be written


def test_images_of_any_kind_are_samples(tmp_path):
    draw(tmp_path, "ant/0.png")
    Image.new("L", (16, 16), 7).save(tmp_path / "ant" / "grey.png")
    data = training.ImageData(str(tmp_path), 16)
    samples = training.Samples(data, lambda image, rng: image, seed=0)
    assert {samples[p][0].shape for p in range(2)} == {(3, 16, 16)}
