"""Both trainings, run as a user runs them: kills, process counts, precisions, corrupt data, the losses of eq. 7."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import (
    AR,
    ROOT,
    SMALL,
    TOKENIZER,
    command,
    draw_pictures,
    environment,
    has_rows,
    kill_when,
    log,
    losses,
    run,
    start,
)
from PIL import Image

import dar
import train_ar
import train_tokenizer
from experiments import classifier

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a trained tokenizer (tokenizer/), 24 pictures of 3 classes (data/), and a trained Llama (ar/)."""
    work = tmp_path_factory.mktemp("work")
    draw_pictures(work / "data")
    words = "--val shapes --out tokenizer --steps 5 --codebook-warmup 2 --times 2 --keep-every 2 --save-every 1".split()
    run(*TOKENIZER, *words, cwd=work)
    run(*AR, *"--val data --tokenizer tokenizer/last.pt --out ar --steps 5 --ema".split(), cwd=work)
    return work


def same_weights(a: Path, b: Path) -> bool:
    a, b = dar.read_checkpoint(a / "last.pt"), dar.read_checkpoint(b / "last.pt")
    return all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") if part in a for k in a[part])


# What comes out


def test_tokenizer_training_logs_draws_and_saves(work):
    rows = log(work / "tokenizer")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"] and all(float(row["loss"]) > 0 for row in rows)
    last = rows[-1]
    assert float(last["val_psnr"]) > 0 and 0 < float(last["val_code_use"]) <= 1 and last["unreadable"] == "0"
    assert 0 < float(last["code_use"]) <= 1 and 0 <= float(last["constant_positions"]) <= 1
    assert float(last["memory_mb"]) > 50 and float(last["images_per_s"]) > 0
    assert float(last["fm"]) + float(last["vq"]) + float(last["commit"]) == pytest.approx(float(last["loss"]), rel=1e-4)
    assert Image.open(work / "tokenizer" / "step-5.png").size == (6 * 18 + 2, 8 * 18 + 2)  # 4 previews between the two
    tokenizer = dar.load_tokenizer(work / "tokenizer" / "last.pt")
    assert tokenizer.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 16)


def test_checkpoints_are_kept_at_every_so_many_steps(work):
    steps = {path.name: dar.read_checkpoint(path)["training"]["step"] for path in (work / "tokenizer").glob("*.pt")}
    assert steps == {"last.pt": 5, "previous.pt": 4, "step-2.pt": 2, "step-4.pt": 4}


def test_code_use_counts_codes_and_positions_over_the_window():
    config = dar.TokenizerConfig(**dict(num_tokens=4, num_groups=4, codebook_size=8))
    use = train_tokenizer.CodeUse(config, dar.Processes(CPU))
    use.add(torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]]))
    use.add(torch.tensor([[0, 5, 2, 3]]))
    assert use.row() == {"code_use": 6 / 8, "constant_positions": 2 / 4}
    use.add(torch.tensor([[7, 7, 7, 7]]))
    assert use.row() == {"code_use": 1 / 8, "constant_positions": 1.0}


def test_held_out_losses_are_logged_by_group(work):
    last = log(work / "ar")[-1]
    groups = [float(last[f"val_group_{k}"]) for k in range(4)]
    assert abs(sum(groups) / 4 - float(last["val_loss"])) < 1e-4
    assert 0 < float(last["unigram_by_position"]) <= float(last["unigram"]) + 1e-6


def test_the_codebook_starts_as_features_of_coming_samples(make_tokenizer):
    tokenizer = make_tokenizer()
    samples = dar.Samples(dar.ImageData("shapes", 32), lambda image, rng: image, seed=0)
    train_tokenizer.start_codebook(tokenizer, samples, 40, CPU)
    images = dar.to_float(torch.stack([samples[40 + i][0] for i in range(8)]))  # 8 x 32 features for 64 codes
    features = torch.nn.functional.normalize(tokenizer.encoder(images), dim=-1).flatten(0, 1)
    same = torch.isclose(tokenizer.quantize.codebook()[:, None], features, atol=1e-5).all(-1)  # [64, 256]
    assert (same.sum(1) >= 1).all() and len(same.int().argmax(1).unique()) > 60
    assert not torch.equal(same.int().argmax(1), torch.arange(64))  # drawn at random
    twin = make_tokenizer()
    train_tokenizer.start_codebook(twin, samples, 40, CPU)
    assert torch.equal(twin.quantize.embedding.weight, tokenizer.quantize.embedding.weight)


# Never lose a step


def a_moment_after(condition, seconds: float):
    """A condition that holds so long after the other one began to hold: within a step, a save or a picture."""
    since = []

    def holds() -> bool:
        if condition() and not since:
            since.append(time.time())
        return bool(since) and time.time() > since[0] + seconds

    return holds


def test_a_tokenizer_training_killed_at_random_moments_goes_on_bit_for_bit(work):
    words = (*TOKENIZER, *"--steps 24 --save-every 3 --codebook-warmup 5 --times 2".split())
    run(*words, "--out", "whole", cwd=work)
    dice, rows = random.Random(time.time_ns()), 0
    for _ in range(3):
        rows += dice.randrange(1, 6)
        moment = a_moment_after(has_rows(work / "killed", rows), dice.uniform(0, 0.1))
        kill_when(moment, *words, "--out", "killed", cwd=work)
    run(*words, "--out", "killed", cwd=work)
    assert losses(work / "killed") == losses(work / "whole") and same_weights(work / "killed", work / "whole")


def test_a_training_killed_at_every_moment_of_saving_goes_on_bit_for_bit(work):
    words = (*TOKENIZER, *"--save-every 1 --keep-every 2 --steps 12".split())
    run(*words, "--out", "saved", cwd=work)
    for moment in range(3, 10):  # the first two calls cut the log; a save is fsync, replace, link, replace, replace
        run(*words, "--out", "torn", cwd=work, probe=True, KILL_AT=moment, code=-signal.SIGKILL)
        if (work / "torn" / "last.pt").exists():
            dar.read_checkpoint(work / "torn" / "last.pt")  # whole at every moment
    run(*words, "--out", "torn", cwd=work)
    assert losses(work / "torn") == losses(work / "saved") and same_weights(work / "torn", work / "saved")
    assert not list((work / "torn").glob("*.tmp"))


def test_a_killed_llama_training_goes_on_bit_for_bit(work):
    words = (*AR, *"--tokenizer tokenizer/last.pt --steps 40 --save-every 7 --dropout 0.1".split())
    run(*words, "--out", "ar-whole", cwd=work)
    kill_when(has_rows(work / "ar-killed", 10), *words, "--out", "ar-killed", cwd=work)
    run(*words, "--out", "ar-killed", cwd=work)
    assert losses(work / "ar-killed") == losses(work / "ar-whole") and same_weights(
        work / "ar-killed", work / "ar-whole"
    )


def test_a_row_of_the_log_is_a_mean_over_its_steps_also_across_a_stop(work):
    words = (*TOKENIZER, *"--steps 8 --log-every 4 --save-every 3".split())
    run(*words, "--out", "means", cwd=work)
    kill_when(has_rows(work / "means-killed", 1), *words, "--out", "means-killed", cwd=work)
    run(*words, "--out", "means-killed", cwd=work)
    assert losses(work / "means-killed") == losses(work / "means") and len(losses(work / "means")) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_exit_code_names_it(work, number):
    out = f"stopped-{number}"
    process = start(*TOKENIZER, *"--steps 100000 --save-every 100000 --out".split(), out, cwd=work)
    while not has_rows(work / out, 2)():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors and "stopped after step" in errors
    assert dar.read_checkpoint(work / out / "last.pt")["training"]["step"] == int(log(work / out)[-1]["step"])


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(work):
    words = command(*TOKENIZER, *"--steps 100000 --save-every 100000 --out both".split(), processes=2)
    process = subprocess.Popen(words, cwd=work, env=environment(), stderr=subprocess.PIPE, text=True)
    while not has_rows(work / "both", 2)():
        assert process.poll() is None
        time.sleep(0.05)
    found = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.split("\n")[1:]
    children = [int(line.split()[0]) for line in found if line and int(line.split()[1]) == process.pid]
    os.kill(max(children), signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "stopped after step" in errors and "Traceback" not in errors.split("stopped after step")[0]
    assert dar.read_checkpoint(work / "both" / "last.pt")["training"]["step"] == int(log(work / "both")[-1]["step"])


def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint(work):
    words = (*TOKENIZER, "--save-every", "2", "--out", "full")
    run(*words, "--steps", 2, cwd=work)
    size = (work / "full" / "last.pt").stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    more = command(*words, "--steps", 4)
    done = subprocess.run(more, cwd=work, env=environment(), capture_output=True, text=True, preexec_fn=limit)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "cannot be written" in last and "Traceback" not in done.stderr
    assert dar.read_checkpoint(work / "full" / "last.pt")["training"]["step"] == 2
    run(*words, "--steps", 4, cwd=work)
    assert [row["step"] for row in log(work / "full")] == ["1", "2", "3", "4"]


def test_a_run_goes_on_with_another_number_of_processes(work):
    words = (*TOKENIZER, *"--out wider --save-every 2".split())
    run(*words, "--steps", 2, cwd=work)
    run(*words, "--steps", 4, cwd=work, processes=2)
    run(*TOKENIZER, *"--out narrow --steps 4".split(), cwd=work)
    for a, b in zip(log(work / "wider"), log(work / "narrow"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)


@pytest.mark.parametrize("change", [["--lr", "inf"], ["--lr", "1e30", "--warmup", "1"]])
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(work, change, tmp_path):
    out = tmp_path / "nan"
    run(*TOKENIZER, "--out", out, "--steps", 2, "--save-every", 1, cwd=work)
    done = run(*TOKENIZER, "--out", out, "--steps", 50, "--save-every", 1, *change, cwd=work, code=3)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: step ") and "not finite" in last and "Traceback" not in done.stderr
    checkpoint = dar.read_checkpoint(out / "previous.pt")
    assert all(w.isfinite().all() for part in ("model", "ema") for w in checkpoint[part].values())


def test_a_gradient_that_is_not_finite_reaches_neither_weights_nor_average(small_args, make_tokenizer):
    model = make_tokenizer()
    run = training_run(small_args, model)
    before = [p.detach().clone() for p in (*model.parameters(), *run.ema.model.parameters())]
    weight = model.quant_in.weight
    with pytest.raises(FloatingPointError, match="step 1: .*fm 0, gradient norm nan"):
        run.optimise(lambda _: {"fm": (0 * weight).sum().sqrt()}, [0], 0.1)  # 0, but its slope is infinite, times 0
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.parameters(), *run.ema.model.parameters())))


# One step, however many processes take it


@pytest.fixture(scope="module")
def one_process(work) -> tuple[list[dict], list[torch.Tensor]]:
    """Two steps of a global batch of 8 in one process: its log, and the gradients of the second step."""
    run(*TOKENIZER, *STEP, "--out", "one", cwd=work, probe=True, GRADIENTS=work / "one")
    return log(work / "one"), torch.load(work / "one-0.pt", weights_only=True)


STEP = "--batch 8 --steps 2 --times 2 --codebook-warmup 0".split()  # quantized, so that its losses count
AR_STEP = "--tokenizer tokenizer/last.pt --batch 8 --steps 2 --dropout 0".split()


def assert_same_step(found: list[dict], gradients, expected: list[dict], reference) -> None:
    """Losses to 1e-5, gradients to 1e-4 of the largest: float32 sums in another order."""
    for a, b in zip(found, expected, strict=True):
        for column in ("loss", "grad_norm"):
            assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-5 if column == "loss" else 1e-4)
    scale = max(g.abs().max() for g in reference)
    for a, b in zip(gradients, reference, strict=True):
        assert (a - b).abs().max() <= 1e-4 * scale


def test_two_processes_take_the_step_that_one_takes(work, one_process):
    run(*TOKENIZER, *STEP, "--out", "two", cwd=work, probe=True, processes=2, GRADIENTS=work / "two")
    first, second = (torch.load(work / f"two-{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # the same bits on both
    assert_same_step(log(work / "two"), first, *one_process)


def test_accumulated_micro_batches_take_the_step_of_the_whole_batch(work, one_process):
    out = ("--out", "accumulated", "--micro-batch", "2")
    run(*TOKENIZER, *STEP, *out, cwd=work, probe=True, GRADIENTS=work / "accumulated")
    gradients = torch.load(work / "accumulated-0.pt", weights_only=True)
    assert_same_step(log(work / "accumulated"), gradients, *one_process)


def test_two_nodes_that_meet_through_torchruns_rendezvous_take_the_same_step(work, one_process):
    nodes = "--nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_id=test --rdzv_endpoint=localhost:29517".split()
    launch = [sys.executable, "-m", "torch.distributed.run", *nodes, str(ROOT / "train_tokenizer.py")]
    words = [*launch, *TOKENIZER[1:], *STEP, "--micro-batch", "2", "--out", "nodes"]
    started = [subprocess.Popen(words, cwd=work, env=environment(), stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    for a, b in zip(log(work / "nodes"), one_process[0], strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)


def test_llama_steps_are_the_same_for_any_number_of_processes(work):
    run(*AR, *AR_STEP, "--out", "ar-one", cwd=work, probe=True, GRADIENTS=work / "ar-one")
    run(*AR, *AR_STEP, "--out", "ar-two", cwd=work, probe=True, processes=2, GRADIENTS=work / "ar-two")
    run(*AR, *AR_STEP, "--out", "ar-sum", "--micro-batch", 2, cwd=work, probe=True, GRADIENTS=work / "ar-sum")
    reference = torch.load(work / "ar-one-0.pt", weights_only=True)
    for name in ("ar-two", "ar-sum"):
        gradients = torch.load(work / f"{name}-0.pt", weights_only=True)
        assert_same_step(log(work / name), gradients, log(work / "ar-one"), reference)


# Precision, memory, speed


@pytest.fixture
def small_args(tmp_path, monkeypatch, restore_signals):
    """A function that parses a tokenizer training's command line."""

    def parse(*words):
        monkeypatch.setattr(
            sys, "argv", [*TOKENIZER, *map(str, words), "--steps", "100", "--out", str(tmp_path / "run")]
        )
        return train_tokenizer.parse_arguments()

    return parse


def training_run(small_args, model, *words) -> dar.TrainingRun:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    return dar.TrainingRun(small_args(*words), dar.Processes(CPU), model, dar.EMA(model), optimizer, {}, ["fm"], [])


def test_bfloat16_follows_the_float32_curve(work):
    words = "--steps 40 --warmup 1 --lr 1e-3 --codebook-warmup 0".split()
    run(*TOKENIZER, *words, "--out", "f32", cwd=work)
    run(*TOKENIZER, *words, "--out", "bf16", "--precision", "bfloat16", cwd=work)
    a, b = (np.array([float(row["fm"]) for row in log(work / name)]) for name in ("f32", "bf16"))
    assert a[-5:].mean() < 0.8 * a[0] and not np.array_equal(a, b)  # it learns; and it was another precision
    assert np.abs(b / a - 1).max() < 0.05


def test_float16_trains_and_skips_the_steps_that_overflow(work, make_tokenizer, small_args):
    run(*TOKENIZER, *"--steps 10 --out f16 --precision float16 --codebook-warmup 0".split(), cwd=work)
    rows = log(work / "f16")
    assert len(rows) == 10 and all(np.isfinite(float(row["loss"])) for row in rows)

    model = make_tokenizer()
    training = training_run(small_args, model, "--precision", "float16")
    training.scaler.scale = 2.0**40  # gradients overflow until it has halved often enough
    images, s = torch.rand(2, 3, 32, 32), torch.tensor([0.3, 0.8])
    taken = []
    for _ in range(30):
        before = model.patchify.weight.detach().clone()
        training.optimise(lambda _: {"fm": training.parallel(images, s, images)["fm"]}, [0], 1e-3)
        taken.append(not torch.equal(before, model.patchify.weight))
    skipped = training.scaler.skipped
    assert 10 < skipped < 30 and taken.count(False) == skipped and not taken[0] and taken[-1]
    assert training.scaler.scale == 2.0 ** (40 - skipped) and training.ema.updates == 30 - skipped


def test_the_loss_scale_doubles_after_2000_good_steps():
    scaler = dar.LossScaler(True)
    assert all(scaler.takes(1.0) for _ in range(1999)) and scaler.scale == 65536
    assert scaler.takes(1.0) and scaler.scale == 131072
    assert not scaler.takes(float("inf")) and scaler.scale == 65536 and scaler.skipped == 1
    assert dar.LossScaler(False).takes(float("nan"))


def test_recomputed_activations_change_nothing(work):
    run(*TOKENIZER, *"--steps 3 --out kept".split(), cwd=work)
    run(*TOKENIZER, *"--steps 3 --out recomputed --checkpoint-blocks".split(), cwd=work)
    assert losses(work / "kept") == losses(work / "recomputed")


# Data


def test_worker_processes_change_nothing(work):
    words = [word.replace("shapes", "data") for word in TOKENIZER] + ["--steps", "4", "--out"]
    run(*words, "alone", cwd=work)
    run(*words, "helped", "--workers", 2, cwd=work)
    assert losses(work / "alone") == losses(work / "helped")


def test_corrupt_files_are_skipped_named_and_counted_and_too_many_stop_the_run(tmp_path):
    data = tmp_path / "data" / "ant"
    data.mkdir(parents=True)
    for i in range(150):
        dar.draw_shape(i, 16).save(data / f"{i:03}.png")
    (data / "007.png").write_bytes(b"no picture")
    words = [word.replace("shapes", "data") for word in TOKENIZER] + ["--batch", "50", "--steps", "3"]
    done = run(*words, "--out", "one-bad", "--workers", 1, cwd=tmp_path)
    assert "007.png" in done.stderr and log(tmp_path / "one-bad")[-1]["unreadable"] == "1"
    for i in range(8, 12):
        (data / f"{i:03}.png").write_bytes(b"no picture")
    done = run(*words, "--out", "five-bad", cwd=tmp_path, code=2)
    assert "of 150 images are unreadable" in done.stderr.splitlines()[-1]


def test_files_are_listed_once_in_a_run(work, tmp_path):
    listing = tmp_path / "images.list"
    first = dar.ImageData(str(work / "data"), 16, listing=listing)
    extra = work / "data" / "ant" / "zzz.png"
    dar.draw_shape(0, 16).save(extra)
    again, anew = dar.ImageData(str(work / "data"), 16, listing=listing), dar.ImageData(str(work / "data"), 16)
    extra.unlink()
    assert len(first) == len(again) == 24 and len(anew) == 25 and first.digest == again.digest != anew.digest
    assert np.array_equal(first.labels, again.labels) and first.class_names == again.class_names
    assert np.array_equal(np.array(first.image(20)), np.array(again.image(20)))


def test_a_samples_noise_does_not_depend_on_its_batch():
    noise = train_tokenizer.sample_noise
    together = noise(1, torch.arange(8), (3, 4, 4), CPU)
    assert torch.equal(together[5:6], noise(1, torch.tensor([5]), (3, 4, 4), CPU))
    assert not torch.equal(together[5], together[6])
    assert not torch.equal(together, noise(2, torch.arange(8), (3, 4, 4), CPU))
    assert abs(together.mean()) < 0.2 and abs(together.std() - 1) < 0.2


# The losses of eq. 7 that look through frozen networks

HUBCONF = '''
import torch


class Standin(torch.nn.Module):
    """Shaped as DINOv2 ViT-B/14: patches of 14 pixels to 768 features, and a class token that is not asked for."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 768, 14, stride=14)

    def forward_features(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return {"x_norm_clstoken": x.mean(1), "x_norm_patchtokens": torch.nn.functional.layer_norm(x, (768,))}


def dinov2_vitb14(pretrained=True):
    assert not pretrained
    return Standin()
'''


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> Path:
    """A folder with random VGG-16 weights under torchvision's names, a stand-in of DINOv2's repository, its weights."""
    import lpips

    folder = tmp_path_factory.mktemp("frozen")
    torch.manual_seed(0)
    vgg = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).net.state_dict()
    torch.save({"features." + name.split(".", 1)[1]: value for name, value in vgg.items()}, folder / "vgg.pth")
    (folder / "dinov2").mkdir()
    (folder / "dinov2" / "hubconf.py").write_text(HUBCONF)
    net = torch.hub.load(str(folder / "dinov2"), "dinov2_vitb14", source="local", pretrained=False)
    torch.save(net.state_dict(), folder / "dinov2.pth")
    return folder


def test_gradients_of_lpips_reach_decoder_and_encoder_and_stop_at_vgg(frozen, make_tokenizer):
    net, tokenizer = train_tokenizer.load_lpips(str(frozen / "vgg.pth")), make_tokenizer()
    weights = torch.load(frozen / "vgg.pth", weights_only=True)
    assert torch.equal(net.net.slice5[-2].weight, weights["features.28.weight"])
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    out = tokenizer(images, torch.tensor([0.2, 0.7]), torch.randn(2, 3, 32, 32))
    assert net(images, images).abs().max() < 1e-6
    distance = net(out["pred_image"], images).mean()
    distance.backward()
    assert distance > 0
    for part in (
        tokenizer.diffusion.patch_out,
        tokenizer.decoder_layers[0].mlp.fc1,
        tokenizer.encoder_layers[0].mlp.fc1,
    ):
        assert part.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in net.parameters())


def test_a_classifiers_features_take_the_place_of_vgg(work, frozen, make_tokenizer):
    torch.manual_seed(0)
    torch.save(classifier.Classifier(10).eval().state_dict(), work / "classifier.pt")
    net, tokenizer = train_tokenizer.load_lpips(None, str(work / "classifier.pt")), make_tokenizer()
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert net(images, images).max() == 0
    near, far = (net(images + width * torch.randn_like(images), images) for width in (0.05, 0.5))
    assert (0 < near).all() and (near < far).all() and (far < 4 * len(net.STAGES)).all()
    out = tokenizer(images, torch.tensor([0.2, 0.7]), torch.randn(2, 3, 32, 32))
    net(out["pred_image"], images).mean().backward()
    assert tokenizer.encoder_layers[0].mlp.fc1.weight.grad.abs().max() > 0
    words = "--out with-classifier --steps 2 --lpips 0.5 --lpips-net".split()
    run(*TOKENIZER, *words, "classifier.pt", cwd=work)
    assert all(float(row["lpips"]) > 0 for row in log(work / "with-classifier"))
    done = run(*TOKENIZER, *words[:-1], "--vgg", frozen / "vgg.pth", cwd=work, code=2)
    assert "lpips_net" in done.stderr  # another loss is another run


def test_init_starts_from_the_averaged_weights_of_another_run(work):
    run(*TOKENIZER, *"--out first --steps 3 --codebook-warmup 0".split(), cwd=work)
    words = "--steps 1 --lr 1e-30 --init first/last.pt --out second".split()  # without the warm-up that is the default
    run(*TOKENIZER, *words, cwd=work)
    first, second = (dar.load_tokenizer(work / out / "last.pt").state_dict() for out in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    done = run(*TOKENIZER, "commit_weight=0.5", *words[:-1], "third", cwd=work, code=2)
    assert "commit_weight" in done.stderr and "first/last.pt" in done.stderr


def test_gradients_of_repa_reach_head_and_encoder_and_stop_at_dinov2(frozen, make_tokenizer):
    net = train_tokenizer.load_dinov2(str(frozen / "dinov2"), str(frozen / "dinov2.pth"))
    tokenizer, images = make_tokenizer(repa_layer=1), torch.rand(2, 3, 32, 32) * 2 - 1
    out = tokenizer(images, torch.rand(2, 3), torch.randn(2, 3, 3, 32, 32))
    target = train_tokenizer.dinov2_features(net, images, 8)
    assert target.shape == (2, 64, 768) and not target.requires_grad
    loss = train_tokenizer.repa_loss(out["repa"], target)
    loss.backward()
    assert tokenizer.diffusion.repa_head[0].weight.grad.abs().max() > 0
    assert tokenizer.diffusion.blocks[0].mlp.fc1.weight.grad.abs().max() > 0
    assert tokenizer.encoder_layers[0].mlp.fc1.weight.grad.abs().max() > 0
    assert tokenizer.diffusion.blocks[1].mlp.fc1.weight.grad is None  # behind the place where REPA reads
    assert all(p.grad is None for p in net.parameters())


def test_the_repa_loss_is_one_minus_the_cosine_and_dinov2_sees_normalised_pixels(frozen):
    target = torch.randn(2, 4, 768)
    loss = train_tokenizer.repa_loss
    assert loss(3 * target.repeat_interleave(2, 0), target).item() == pytest.approx(0, abs=1e-6)
    assert loss(-target, target).item() == pytest.approx(2, abs=1e-6)
    seen = []
    net = train_tokenizer.load_dinov2(str(frozen / "dinov2"), str(frozen / "dinov2.pth"))
    net.patches.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    train_tokenizer.dinov2_features(net, torch.full((1, 3, 32, 32), -1.0), 8)
    assert seen[0].shape == (1, 3, 112, 112)
    black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), black, rtol=1e-4, atol=1e-4)


def test_training_with_the_whole_loss_and_without(work, frozen):
    files = f"--vgg {frozen}/vgg.pth --dinov2-repo {frozen}/dinov2 --dinov2 {frozen}/dinov2.pth".split()
    words = [*TOKENIZER, "repa_layer=0", "--steps", "2", *files]
    run(*words, *"--out whole-loss --lpips 0.5 --repa 0.5 --times 2".split(), cwd=work)
    for row in log(work / "whole-loss"):
        terms = [float(row[name]) for name in ("fm", "vq", "commit", "lpips", "repa")]
        assert terms[3] > 0 and 0 < terms[4] < 1 and sum(terms) == pytest.approx(float(row["loss"]), rel=1e-4)
    (work / "hidden").mkdir()
    (work / "hidden" / "lpips.py").write_text("raise SystemExit('touched')")  # found before the real package
    run(*words[:-6], *"--out no-loss --lpips 0 --repa 0".split(), cwd=work, PYTHONPATH=work / "hidden")
    head = "diffusion.repa_head.0.weight"
    trained, frozen_head = (
        dar.read_checkpoint(work / out / "last.pt")["model"][head] for out in ("whole-loss", "no-loss")
    )
    torch.manual_seed(0)
    args = [word for word in SMALL if "=" in word]
    fields = {name: int(value) for name, value in (word.split("=") for word in args)} | {"repa_layer": 0}
    config = dar.dataclasses.replace(dar.TOKENIZER_PRESETS["tiny"], **fields)
    fresh = dar.SequentialDiffusionTokenizer(config).state_dict()[head]
    assert torch.equal(frozen_head, fresh) and not torch.equal(trained, fresh)


@pytest.mark.parametrize(
    "words, named",
    [
        ("--lpips 0.5 --vgg nowhere.pth", "nowhere.pth"),
        ("--lpips 0.5 --vgg tokenizer/last.pt", "last.pt: not the weights"),
        ("--lpips 0.5", "--vgg FILE"),
        ("--repa 0.5", "repa_layer"),
        ("--repa 0.5 --set repa_layer=0 --dinov2-repo nowhere", "nowhere"),
        ("--repa 0.5 --set repa_layer=0", "--dinov2-repo DIR"),
        ("--prefetch", "--prefetch"),
    ],
)
def test_a_missing_network_is_one_line(work, tmp_path, words, named):
    offline = dict(https_proxy="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9", TORCH_HOME=tmp_path)
    done = run("train_tokenizer.py", *"--data shapes --out o".split(), *words.split(), cwd=work, code=2, **offline)
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("Downloading")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], done.stderr


# The Llama's codes


def test_the_ten_crops_are_torchvisions():
    from torchvision.transforms import TenCrop

    noise = np.random.default_rng(0).integers(0, 256, (330, 300, 3), dtype=np.uint8)
    for size in (64, 100, 256):
        image = Image.fromarray(noise)
        expected = TenCrop(size)(dar.center_crop(image, int(1.1 * size)))
        found = train_ar.crops(image, size)
        assert len(found) == 10
        for a, b in zip(found, expected):
            assert np.array_equal(np.array(a), np.array(b))


def test_small_images_give_themselves_and_their_mirror():
    image = dar.draw_shape(3, 32)
    found = [np.array(view) for view in train_ar.crops(image, 32)]
    assert len(found) == 2 and np.array_equal(found[0], np.array(image)) and np.array_equal(found[1], found[0][:, ::-1])


def test_an_extraction_that_was_killed_goes_on(work):
    for i in range(7 * train_ar.CHUNK):
        folder = work / "many" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i % 256, 40 * (i // 256), 90)).save(folder / f"{i}.png")
    words = ["many" if word == "data" else word for word in AR] + "--tokenizer tokenizer/last.pt --steps 3".split()
    run(*words, "--out", "codes-whole", cwd=work)
    done = work / "codes-killed" / "codes" / "done.npy"

    def part_is_done():
        return done.exists() and done.stat().st_size > 128 and 2 <= np.load(done, mmap_mode="r").sum() < 6

    kill_when(part_is_done, *words, "--out", "codes-killed", cwd=work)
    before = int(np.load(done).sum())
    result = run(*words, "--out", "codes-killed", cwd=work, processes=2)
    assert "tokenizing many" in result.stderr and "/7 " not in result.stderr and before >= 2  # only what was missing
    whole, killed = (np.load(work / name / "codes" / "codes.npy") for name in ("codes-whole", "codes-killed"))
    assert np.array_equal(whole, killed) and whole.shape == (7 * train_ar.CHUNK, 2, 16) and len(np.unique(whole)) > 1
    for a, b in zip(log(work / "codes-whole"), log(work / "codes-killed"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)


def test_codes_of_another_tokenizer_or_of_other_images_are_refused(work):
    run(*TOKENIZER, "--out", "other", "--steps", 1, "--seed", 7, cwd=work)
    done = run(*AR, "--tokenizer", "other/last.pt", "--out", "ar", "--steps", 5, cwd=work, code=2)
    assert "of another tokenizer" in done.stderr
    words = ["many" if word == "data" else word for word in AR]
    (work / "ar" / "images.list").rename(work / "ar" / "images.bak")
    done = run(*words, "--tokenizer", "tokenizer/last.pt", "--out", "ar", "--steps", 5, cwd=work, code=2)
    assert "of another data" in done.stderr


def test_tokenizing_on_the_fly_trains_the_same(work):
    run(*AR, *"--tokenizer tokenizer/last.pt --steps 4 --out cached".split(), cwd=work)
    run(*AR, *"--tokenizer tokenizer/last.pt --steps 4 --out fly --on-the-fly".split(), cwd=work)
    assert not (work / "fly" / "codes").exists()
    assert losses(work / "fly") == losses(work / "cached")


def test_unreadable_images_have_no_codes(tmp_path, make_tokenizer):
    data = tmp_path / "data" / "ant"
    data.mkdir(parents=True)
    for i in range(120):
        dar.draw_shape(i, 32).save(data / f"{i:03}.png")
    (data / "050.png").write_bytes(b"no picture")
    images = dar.ImageData(str(tmp_path / "data"), 32)
    codes = train_ar.extract_codes(make_tokenizer(), "digest", images, tmp_path / "codes", False, dar.Processes(CPU))
    samples = train_ar.CodeSamples(codes, images, seed=0)
    assert len(samples.usable) == 119 and 50 not in samples.usable and int(images.unreadable.sum()) == 1


def test_a_llama_learns_32_images_by_heart(tmp_path, make_tokenizer):
    tokenizer, pictures = make_tokenizer(), []
    dar.save_checkpoint(tmp_path / "tokenizer.pt", tokenizer)
    for i in range(32):  # a class each; symmetric, so that image and mirror have the same codes
        half = np.array(dar.draw_shape(i, 32))[:, :16]
        pictures.append(np.concatenate((half, half[:, ::-1]), 1))
        folder = tmp_path / "data" / f"{i:02}"
        folder.mkdir(parents=True)
        Image.fromarray(pictures[-1]).save(folder / "x.png")
    codes = tokenizer.encode(dar.to_float(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)))
    assert len(codes.unique(dim=0)) == 32
    words = (
        "--tokenizer tokenizer.pt --batch 32 --steps 250 --log-every 50 --lr 4e-3 --class-dropout 0 --layers 2 --out ar"
    )
    run(*AR, *words.split(), cwd=tmp_path)
    assert float(log(tmp_path / "ar")[-1]["loss"]) < 0.05
    ar = dar.load_ar(tmp_path / "ar" / "last.pt")
    assert torch.equal(ar.generate(torch.arange(32), cfg=None, greedy=True), codes)


# SLURM

STUBS = {  # what the script calls, on a "cluster" of this machine: one node with two processes
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >>"$STUBS/calls"; fi',
    "srun": 'echo $$ >"$STUBS/pid"; shift 2; exec "$@"',
    "scancel": 'kill -TERM "$(cat "$STUBS/pid")"; echo "$@" >>"$STUBS/calls"',
}


def test_a_slurm_job_that_is_told_to_stop_saves_and_queues_again_and_goes_on(tmp_path):
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    nodes = dict(
        SLURM_NNODES="1", SLURM_GPUS_ON_NODE="2", SLURM_JOB_NODELIST="localhost", SLURM_JOB_ID=str(os.getpid())
    )
    variables = environment(**nodes, PATH=path, STUBS=str(tmp_path))
    words = [*TOKENIZER, "--out", str(tmp_path / "run"), "--save-every", "10000"]
    words[0] = str(ROOT / words[0])

    def job(steps: int) -> subprocess.Popen:
        command = ["bash", ROOT / "experiments" / "slurm.sh", *words, "--steps", str(steps)]
        return subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True)

    first = job(100_000)
    deadline = time.time() + 120
    while not has_rows(tmp_path / "run", 3)() and time.time() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    try:
        assert first.wait(60) == 0
    finally:
        subprocess.run(["pkill", "-KILL", "-f", str(tmp_path / "run")])  # whatever was not told to stop
    calls = (tmp_path / "calls").read_text()
    assert f"requeue {os.getpid()}" in calls and f"--signal=TERM {os.getpid()}.0" in calls
    done = dar.read_checkpoint(tmp_path / "run" / "last.pt")["training"]["step"]
    assert done >= 3
    second = job(done + 2)
    assert second.wait(120) == 0, second.stderr.read()
    assert dar.read_checkpoint(tmp_path / "run" / "last.pt")["training"]["step"] == done + 2
    assert (tmp_path / "calls").read_text() == calls  # an end is no reason to queue again
