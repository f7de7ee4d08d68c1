"""Both trainings, run as a user runs them: kills, process counts, precisions, corrupt data, the losses of eq. 7."""

import contextlib
import dataclasses
import os
import pickle
import random
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
    BASELINE,
    GLOO_ABORTS,
    ROOT,
    SMALL,
    TOKENIZER,
    draw_pictures,
    environment,
    has_rows,
    kill_when,
    log,
    losses,
    run,
    start,
    wait_for,
)
from PIL import Image

import dar
import sample
import train_ar
import train_tokenizer
import training
from experiments import classifier

CPU = torch.device("cpu")


def same_weights(a: Path, b: Path) -> bool:
    a, b = dar.read_checkpoint(a / "last.pt"), dar.read_checkpoint(b / "last.pt")
    return all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") if part in a for k in a[part])


# What comes out


def test_tokenizer_training_logs_draws_and_saves(work):
    rows = log(work / "tokenizer")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"] and all(float(row["loss"]) > 0 for row in rows)
    last = rows[-1]
    assert float(last["val_psnr"]) > 0 and 0 < float(last["val_code_use"]) <= 1 and last["unreadable"] == "0"
    assert 0 < float(last["code_use"]) <= 1 and 0 <= float(last["constant_positions"]) <= 1
    assert float(last["images_per_s"]) > 0
    assert float(last["fm"]) + float(last["vq"]) + float(last["commit"]) == pytest.approx(float(last["loss"]), rel=1e-4)
    assert Image.open(work / "tokenizer" / "step-4.png").size == (6 * 18 + 2, 8 * 18 + 2)  # 4 previews between the two
    tokenizer = dar.load_tokenizer(work / "tokenizer" / "last.pt")
    assert tokenizer.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 16)


def test_the_first_seconds_of_the_shapes_recipe_are_seen_to_learn(tmp_path):
    shapes = "--preset shapes --data shapes --val shapes --device cpu --log-every 20 --picture-every 30".split()
    done = run("train_tokenizer.py", *shapes, *"--steps 60 --codebook-warmup 30 --out tokenizer".split(), cwd=tmp_path)
    rows = log(tmp_path / "tokenizer")
    fm = [float(row["fm"]) for row in rows]
    assert len(fm) == 4 and fm == sorted(fm, reverse=True) and fm[-1] < 0.8 * fm[0] and float(rows[-1]["val_psnr"]) > 0
    pictures = [np.array(Image.open(tmp_path / "tokenizer" / f"step-{step}.png")) for step in (30, 60)]
    assert all(a.shape == b.shape and (a != b).any() for a, b in zip(pictures, pictures[1:]))
    following = done.stderr.splitlines()[-1].split("; ")
    assert following[1].endswith("step-*.png") and following[2].startswith("next: python train_ar.py --preset shapes ")

    words = following[2].split()[2:]  # the next command, as it is said
    done = run(*words, *"--device cpu --steps 40 --log-every 20 --picture-every 40".split(), cwd=tmp_path)
    first, last = (float(row["loss"]) for row in log(tmp_path / "tokenizer-ar"))
    assert last < 0.85 * first and Image.open(tmp_path / "tokenizer-ar" / "step-40.png").size == (4 * 18 + 2,) * 2
    words = done.stderr.splitlines()[-1].split("; ")[2].split()[2:]
    run(*words, cwd=tmp_path)
    assert (tmp_path / "samples.png").exists()

    judged = run("experiments/judge.py", "tokenizer-ar/last.pt", "--num", "20", cwd=tmp_path).stdout.splitlines()
    shares = {line[:24].strip(): [float(word.rstrip("%")) for word in line[24:].split()[:2]] for line in judged[1:-1]}
    assert [*shares] == ["originals", "reconstructions", "samples, no guidance", "samples, guidance 4"]
    assert shares["originals"] == [100, 100] and shares["samples, guidance 4"][0] == 0  # noise is of no shape


def test_checkpoints_are_kept_at_every_so_many_steps(work):
    steps = {path.name: dar.read_checkpoint(path)["training"]["step"] for path in (work / "tokenizer").glob("*.pt")}
    assert steps == {"last.pt": 4, "previous.pt": 3, "step-2.pt": 2, "step-4.pt": 4}


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
    samples = training.Samples(training.ImageData("shapes", 32), lambda image, rng: image, seed=0)
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


@pytest.mark.slow
def test_a_tokenizer_training_killed_at_random_moments_goes_on_bit_for_bit(work):
    words = (*TOKENIZER, *"--steps 300 --save-every 3 --codebook-warmup 5 --times 2".split())
    run(*words, "--out", "whole", cwd=work)
    dice, rows = random.Random(time.time_ns()), 0
    for _ in range(3):
        rows += dice.randrange(1, 20)
        moment = a_moment_after(has_rows(work / "killed", rows), dice.uniform(0, 0.1))
        kill_when(moment, *words, "--out", "killed", cwd=work)
    run(*words, "--out", "killed", cwd=work)
    assert losses(work / "killed") == losses(work / "whole") and same_weights(work / "killed", work / "whole")


@pytest.mark.slow
def test_a_training_killed_at_every_moment_of_saving_goes_on_bit_for_bit(work):
    words = (*BASELINE, *"--save-every 1 --keep-every 2 --steps 14".split())
    run(*words, "--out", "saved", cwd=work)
    for moment in range(1, 9):  # of the writes and renames that two saves consist of, one of which keeps a checkpoint
        run(*words, "--out", "torn", cwd=work, probe=True, KILL_AT=moment, code=-signal.SIGKILL)
        whole = [path for path in (work / "torn").glob("*.pt") if dar.read_checkpoint(path)]  # whole at every moment
        assert moment < 3 or {"last.pt", "previous.pt"} & {path.name for path in whole}
    run(*words, "--out", "torn", cwd=work)
    assert losses(work / "torn") == losses(work / "saved") and same_weights(work / "torn", work / "saved")
    assert not list((work / "torn").glob("*.tmp"))


@pytest.mark.slow
def test_a_killed_llama_training_goes_on_bit_for_bit(work):
    words = (*AR, *"--tokenizer tokenizer/last.pt --steps 400 --save-every 17 --dropout 0.1".split())
    run(*words, "--out", "ar-whole", cwd=work)
    kill_when(has_rows(work / "ar-killed", 10), *words, "--out", "ar-killed", cwd=work)
    run(*words, "--out", "ar-killed", cwd=work)
    assert losses(work / "ar-killed") == losses(work / "ar-whole")
    assert same_weights(work / "ar-killed", work / "ar-whole")


def test_a_signal_saves_and_the_exit_code_names_it(work):
    process = start(*TOKENIZER, *"--steps 100000 --save-every 100000 --out stopped".split(), cwd=work)
    wait_for(has_rows(work / "stopped", 2), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors and "stopped after step" in errors
    step = dar.read_checkpoint(work / "stopped" / "last.pt")["training"]["step"]
    assert step == int(log(work / "stopped")[-1]["step"])


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(work):
    process = start(*TOKENIZER, *"--steps 100000 --save-every 100000 --out both".split(), cwd=work, processes=2)
    wait_for(has_rows(work / "both", 2), process)
    found = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.split("\n")[1:]
    children = [int(line.split()[0]) for line in found if line and int(line.split()[1]) == process.pid]
    os.kill(max(children), signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert "stopped after step" in errors and "Traceback" not in errors.split("stopped after step")[0]
    assert dar.read_checkpoint(work / "both" / "last.pt")["training"]["step"] == int(log(work / "both")[-1]["step"])


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(work):
    words = (*BASELINE, *"--out wider --save-every 2".split())
    run(*words, "--steps", 2, cwd=work)
    run(*words, "--steps", 4, cwd=work, processes=2)
    run(*words, "--out", "narrow", "--steps", 2, cwd=work)
    run(*words, "--out", "narrow", "--steps", 4, cwd=work)  # the rate falls to 0 over the steps: 2 and then 4, too
    for a, b in zip(log(work / "wider"), log(work / "narrow"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(work, tmp_path):
    words = (*BASELINE, "--out", tmp_path, "--save-every", 1)
    done = run(*words, "--steps", 50, "--lr", "1e9", "--warmup", 0, cwd=work, code=3)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: step ") and "not finite" in last and "Traceback" not in done.stderr
    checkpoint = dar.read_checkpoint(tmp_path / "last.pt")
    assert all(w.isfinite().all() for part in ("model", "ema") for w in checkpoint[part].values())


def test_a_failed_start_leaves_no_trace_in_the_next(tmp_path):
    flat, in_classes, words = tmp_path / "flat", tmp_path / "in-classes", [*TOKENIZER, "--out", tmp_path / "run"]
    draw_pictures(in_classes)
    flat.mkdir()
    training.draw_shape(0, 16).save(flat / "x.png")
    assert "sub-folder" in run(*words, "--steps", 1, "--data", flat, cwd=tmp_path, code=2).stderr
    run(*words, "--steps", 1, "--data", in_classes, cwd=tmp_path)
    settings = dar.read_checkpoint(tmp_path / "run" / "last.pt")["training"]["settings"]
    assert settings["data"] == training.ImageData(str(in_classes), 16).digest


# One step, however many processes take it

STEP = "--batch 8 --steps 2 --times 2 --codebook-warmup 0".split()  # quantized, so that its losses count
AR_STEP = "--tokenizer tokenizer/last.pt --batch 8 --steps 2 --dropout 0".split()


@pytest.fixture(scope="module")
def one_process(work) -> tuple[list[dict], list[torch.Tensor]]:
    """Two steps of a global batch of 8 in one process: its log, and the gradients of the second step."""
    run(*TOKENIZER, *STEP, "--out", "one", cwd=work, probe=True, GRADIENTS=work / "one")
    return log(work / "one"), torch.load(work / "one-0.pt", weights_only=True)


def assert_same_step(found: list[dict], gradients, expected: list[dict], reference) -> None:
    """Losses to 1e-5, gradients to 1e-4 of the largest: float32 sums in another order."""
    for a, b in zip(found, expected, strict=True):
        for column in ("loss", "grad_norm"):
            assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-5 if column == "loss" else 1e-4)
    scale = max(g.abs().max() for g in reference)
    for a, b in zip(gradients, reference, strict=True):
        assert (a - b).abs().max() <= 1e-4 * scale


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_nodes_that_meet_through_torchruns_rendezvous_take_the_same_step(work, one_process, tmp_path):
    meet = ["--rdzv_backend=c10d", "--rdzv_conf=store_type=file", f"--rdzv_endpoint={tmp_path / 'meet'}"]
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_id=test", *meet]  # a file takes a port's place
    launch = [sys.executable, "-m", "torch.distributed.run", *nodes, str(ROOT / "train_tokenizer.py")]
    words = [*launch, *TOKENIZER[1:], *STEP, "--micro-batch", "2", "--out", "nodes"]
    started = [subprocess.Popen(words, cwd=work, env=environment(), stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        for process in started:
            process.wait(timeout=500)
    finally:
        for process in started:
            process.kill()
    for a, b in zip(log(work / "nodes"), one_process[0], strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)


@pytest.mark.slow
def test_llama_steps_are_the_same_for_any_number_of_processes(work):
    run(*AR, *AR_STEP, "--out", "ar-one", cwd=work, probe=True, GRADIENTS=work / "ar-one")
    run(*AR, *AR_STEP, "--out", "ar-two", cwd=work, probe=True, processes=2, GRADIENTS=work / "ar-two")
    run(*AR, *AR_STEP, "--out", "ar-sum", "--micro-batch", 2, cwd=work, probe=True, GRADIENTS=work / "ar-sum")
    reference = torch.load(work / "ar-one-0.pt", weights_only=True)
    for name in ("ar-two", "ar-sum"):
        gradients = torch.load(work / f"{name}-0.pt", weights_only=True)
        assert_same_step(log(work / name), gradients, log(work / "ar-one"), reference)


# Precision, memory, speed


@pytest.mark.slow
def test_bfloat16_follows_the_float32_curve(work):
    words = "--steps 40 --warmup 1 --lr 1e-3 --codebook-warmup 0".split()
    run(*TOKENIZER, *words, "--out", "f32", cwd=work)
    run(*TOKENIZER, *words, "--out", "bf16", "--precision", "bfloat16", cwd=work)
    a, b = (np.array([float(row["fm"]) for row in log(work / name)]) for name in ("f32", "bf16"))
    assert a[-5:].mean() < 0.8 * a[0] and not np.array_equal(a, b)  # it learns; and it was another precision
    assert np.abs(b / a - 1).max() < 0.05


@pytest.mark.slow
def test_float16_trains_a_tokenizer(work):
    run(*TOKENIZER, *"--steps 10 --out f16 --precision float16 --codebook-warmup 0".split(), cwd=work)
    rows = log(work / "f16")
    assert len(rows) == 10 and all(np.isfinite(float(row["loss"])) for row in rows)


@pytest.mark.slow
def test_recomputed_activations_change_nothing(work):
    run(*BASELINE, "--out", "recomputed", "--checkpoint-blocks", cwd=work)
    assert losses(work / "recomputed") == losses(work / "tokenizer")


def test_recomputation_keeps_only_the_inputs_of_blocks(make_tokenizer, tmp_path):
    tokenizer, stored = make_tokenizer(diffusion_layers=4), []
    images, s, noise = torch.rand(2, 3, 32, 32), torch.tensor([0.3, 0.8]), torch.randn(2, 3, 32, 32)
    args = training.Arguments(data="shapes", out=str(tmp_path), batch=2, device="cpu")

    def activations() -> int:
        stored.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: (stored.append(x.numel()), x)[1], lambda x: x)
        with hooks:
            tokenizer(images, s, noise)["fm"].backward()
        return sum(stored)

    before, gradients = activations(), [p.grad.clone() for p in tokenizer.parameters() if p.grad is not None]
    tokenizer.zero_grad()
    args.checkpoint_blocks = True
    training.TrainingRun(args, dar.Processes(CPU), tokenizer, None, None, {}, [])
    assert activations() < 0.5 * before
    again = [p.grad for p in tokenizer.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.slow
def test_compiled_trainings_follow_the_others(work):
    run(*BASELINE, "--out", "compiled", "--compile", cwd=work)
    run(*AR, *"--val data --tokenizer tokenizer/last.pt --out ar-compiled --steps 5 --ema --compile".split(), cwd=work)
    for compiled, plain in (("compiled", "tokenizer"), ("ar-compiled", "ar")):
        for a, b in zip(log(work / compiled), log(work / plain), strict=True):
            assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)


# Data


@pytest.mark.slow
def test_worker_processes_change_nothing(work):
    run(*BASELINE, "--out", "helped", "--workers", 2, cwd=work)
    assert losses(work / "helped") == losses(work / "tokenizer")


@pytest.mark.slow
def test_worker_processes_of_a_mac_change_nothing(work):
    run(*BASELINE, "--out", "spawned", "--workers", 1, cwd=work, probe=True, START_METHOD="spawn")
    assert losses(work / "spawned") == losses(work / "tokenizer")
    words = [*AR, *"--tokenizer tokenizer/last.pt --out ar-spawned --steps 5 --ema --workers 1".split()]
    run(*words, cwd=work, probe=True, START_METHOD="spawn")
    assert losses(work / "ar-spawned") == losses(work / "ar")


def test_corrupt_files_are_skipped_named_and_counted(tmp_path):
    data = tmp_path / "data" / "ant"
    data.mkdir(parents=True)
    for i in range(150):
        training.draw_shape(i, 16).save(data / f"{i:03}.png")
    (data / "007.png").write_bytes(b"no picture")
    words = [word.replace("shapes", "data") for word in TOKENIZER] + ["--batch", "50"]
    done = run(*words, *"--steps 3 --save-every 2 --out one-bad --workers 1".split(), cwd=tmp_path)
    assert "007.png" in done.stderr and log(tmp_path / "one-bad")[-1]["unreadable"] == "1"
    done = run(*words, *"--steps 6 --save-every 2 --out one-bad --workers 1".split(), cwd=tmp_path)
    assert log(tmp_path / "one-bad")[-1]["unreadable"] == "2"  # met again in the second epoch, after a stop


def test_a_samples_noise_does_not_depend_on_its_batch():
    noise = train_tokenizer.sample_noise
    together = noise(1, torch.arange(8), (3, 4, 4), CPU)
    assert torch.equal(together[5:6], noise(1, torch.tensor([5]), (3, 4, 4), CPU))
    assert not torch.equal(together[5], together[6])
    assert not torch.equal(together, noise(2, torch.arange(8), (3, 4, 4), CPU))
    assert abs(together.mean()) < 0.2 and abs(together.std() - 1) < 0.2
    assert (
        noise(2**31, torch.tensor([2**40]), (2,), CPU).isfinite().all()
    )  # the largest seed, and one more for the codes


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
    for file in ("first.pt", "second.pt"):
        torch.save(classifier.Classifier(10).eval().state_dict(), work / file)
    net = classifier.PerceptualDistance(classifier.load_classifier(work / "first.pt", "cpu"))
    tokenizer = make_tokenizer()
    assert not net.body.training and not any(p.requires_grad for p in net.parameters())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert net(images, images).max() == 0
    near, far = (net(images + width * torch.randn_like(images), images) for width in (0.05, 0.5))
    assert (0 < near).all() and (near < far).all() and (far < 4 * sum(net.STAGES.values())).all()
    out = tokenizer(images, torch.tensor([0.2, 0.7]), torch.randn(2, 3, 32, 32))
    net(out["pred_image"], images).mean().backward()
    assert tokenizer.encoder_layers[0].mlp.fc1.weight.grad.abs().max() > 0
    words = "--steps 2 --log-every 1 --lpips 0.5 --lpips-net first.pt".split()
    run(*TOKENIZER, *words, "--out", "one-net", cwd=work)
    run(*TOKENIZER, *words, "second.pt", "--out", "two-nets", cwd=work)
    one, two = ([float(row["lpips"]) for row in log(work / name)] for name in ("one-net", "two-nets"))
    assert min(one + two) > 0 and one[0] == two[0] and one[1] != two[1]  # they take turns
    code = "import dar, train_tokenizer as t; t.PATTERN = 0.0; dar.command_line(t.main)"
    words = [sys.executable, "-c", code, *TOKENIZER[1:], *words, "--out", "free"]
    subprocess.run(words, cwd=work, env=environment(PYTHONPATH=str(ROOT)), check=True, capture_output=True)
    assert float(log(work / "free")[0]["lpips"]) < 0.99 * one[0]  # dots have a price


def test_repeated_error_sees_what_all_patches_have_alike_and_nothing_else():
    dots = torch.randn(2, 3, 4, 4)
    dots -= dots.mean((2, 3), keepdim=True)
    repeated, colour = dots.repeat(1, 1, 8, 8), torch.randn(2, 3, 1, 1)
    assert torch.allclose(train_tokenizer.repeated_error(repeated + colour, 4), dots.square().mean((1, 2, 3)))
    signs = torch.tensor([1.0, -1.0]).repeat(4).repeat_interleave(4)  # every second row of patches has them reversed
    assert train_tokenizer.repeated_error(repeated * signs[:, None], 4).max() < 1e-10


@pytest.mark.slow
def test_init_starts_from_the_averaged_weights_of_another_run(work):
    words = "--steps 1 --lr 1e-30 --init tokenizer/last.pt --out second".split()  # by default no codebook warm-up
    run(*TOKENIZER, *words, cwd=work)
    first, second = (dar.load_tokenizer(work / out / "last.pt").state_dict() for out in ("tokenizer", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    done = run(*TOKENIZER, "commit_weight=0.5", *words[:-1], "third", cwd=work, code=2)
    assert "commit_weight" in done.stderr and "tokenizer/last.pt" in done.stderr


def test_init_takes_the_tokenizer_of_a_llama_and_any_time_shift():
    first = dar.load_ar(sample.SHIPPED, dtype=torch.float32).tokenizer
    args = train_tokenizer.Arguments(init=str(sample.SHIPPED))
    found = train_tokenizer.build_model(args, dataclasses.replace(first.config, time_shift=9.0))
    assert found.config.time_shift == 9 and torch.equal(found.patchify.weight, first.patchify.weight)
    with pytest.raises(ValueError, match="code_dim"):
        train_tokenizer.build_model(args, dataclasses.replace(first.config, code_dim=7))


def test_init_takes_the_weights_of_a_llama_of_the_same_shape():
    first = dar.load_ar(sample.SHIPPED, dtype=torch.float32)
    args = train_ar.Arguments(preset="cifar10", init=str(sample.SHIPPED), dropout=0.25)
    found = train_ar.build_model(args, first.tokenizer, list("abcdefghij"))
    assert found.config.dropout == 0.25 and found.class_names == list("abcdefghij")
    assert all(torch.equal(weight, found.state_dict()[name]) for name, weight in first.state_dict().items())
    with pytest.raises(ValueError, match="cifar10.pt: is .*width=256.* this run's .*width=128"):
        train_ar.build_model(dataclasses.replace(args, width=128), first.tokenizer, first.class_names)


def test_gradients_of_repa_reach_head_and_encoder_and_stop_at_dinov2(frozen, make_tokenizer):
    net = train_tokenizer.load_dinov2(str(frozen / "dinov2"), str(frozen / "dinov2.pth"))
    tokenizer, images = make_tokenizer(repa_layer=1), torch.rand(2, 3, 32, 32) * 2 - 1
    out = tokenizer(images, torch.rand(2, 3), torch.randn(2, 3, 3, 32, 32))
    target = train_tokenizer.dinov2_features(net, 8, images)
    assert target.shape == (2, 64, 768) and not target.requires_grad
    dar.tokenizer_loss(out, images, repa_target=target)["repa"].backward()
    assert tokenizer.diffusion.repa_head[0].weight.grad.abs().max() > 0
    assert tokenizer.diffusion.blocks[0].mlp.fc1.weight.grad.abs().max() > 0
    assert tokenizer.encoder_layers[0].mlp.fc1.weight.grad.abs().max() > 0
    assert tokenizer.diffusion.blocks[1].mlp.fc1.weight.grad is None  # behind the place where REPA reads
    assert all(p.grad is None for p in net.parameters())


def test_dinov2_sees_normalised_pixels(frozen):
    seen = []
    net = train_tokenizer.load_dinov2(str(frozen / "dinov2"), str(frozen / "dinov2.pth"))
    net.patches.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    train_tokenizer.dinov2_features(net, 8, torch.full((1, 3, 32, 32), -1.0))
    assert seen[0].shape == (1, 3, 112, 112)
    black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), black, rtol=1e-4, atol=1e-4)


def test_frozen_networks_run_in_float32():
    def network(*images):
        assert not torch.is_autocast_enabled("cpu") and all(x.dtype == torch.float32 for x in images)
        return images[0] @ images[0]

    x = torch.rand(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = train_tokenizer.in_float32(network)(x, x.bfloat16())
    assert torch.equal(found, x @ x)


@pytest.mark.slow
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
    config = dataclasses.replace(dar.TOKENIZER_PRESETS["tiny"], **fields)
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
def test_a_missing_network_is_one_line(work, tmp_path, monkeypatch, words, named):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no internet
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *"--data shapes --out o".split(), *words.split()])
    with pytest.raises((ValueError, OSError)) as refused:
        train_tokenizer.main()
    assert named in str(refused.value) and len(str(refused.value).splitlines()) == 1
    assert not (work / "o").exists()


def test_a_damaged_download_is_named(frozen, tmp_path, monkeypatch):
    cache, names = tmp_path / "hub" / "checkpoints", {"vgg.pth": "vgg16-397923af.pth"}
    names["dinov2.pth"] = "dinov2_vitb14_pretrain.pth"
    cache.mkdir(parents=True)
    for whole, name in names.items():
        (cache / name).write_bytes((frozen / whole).read_bytes()[:1000])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError, match=f"VGG-16 cannot be loaded .*delete {cache / names['vgg.pth']} .*--prefetch"):
        train_tokenizer.load_lpips(None)
    with pytest.raises(OSError, match=f"DINOv2 cannot be loaded .*delete {cache / names['dinov2.pth']} .*--prefetch"):
        train_tokenizer.load_dinov2(str(frozen / "dinov2"), None)


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
    image = training.draw_shape(3, 32)
    found = [np.array(view) for view in train_ar.crops(image, 32)]
    assert len(found) == 2 and np.array_equal(found[0], np.array(image)) and np.array_equal(found[1], found[0][:, ::-1])


@pytest.mark.slow
def test_an_extraction_that_was_killed_goes_on(work):
    for i in range(7 * train_ar.CHUNK):
        folder = work / "many" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i % 256, 40 * (i // 256), 90)).save(folder / f"{i}.png")
    words = ["many" if word == "data" else word for word in AR] + "--tokenizer tokenizer/last.pt --steps 3".split()
    run(*words, "--out", "codes-whole", cwd=work)
    sources = work / "codes-killed" / "codes" / "sources.npy"

    def part_is_done():
        return sources.exists() and (np.load(sources, mmap_mode="r") >= 0).sum() >= 2 * train_ar.CHUNK

    kill_when(part_is_done, *words, "--out", "codes-killed", cwd=work)
    before = int((np.load(sources) >= 0).sum())
    result = run(*words, "--out", "codes-killed", cwd=work, processes=2)
    assert before >= 2 * train_ar.CHUNK and "/7 " not in result.stderr  # only what was missing
    whole, killed = (np.load(work / name / "codes" / "codes.npy") for name in ("codes-whole", "codes-killed"))
    assert np.array_equal(whole, killed) and whole.shape == (7 * train_ar.CHUNK, 2, 16) and len(np.unique(whole)) > 1
    for a, b in zip(log(work / "codes-whole"), log(work / "codes-killed"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)


def test_codes_of_another_tokenizer_or_of_other_images_are_refused(small_tokenizer, tmp_path):
    data, folder = training.ImageData("shapes", 32), tmp_path / "codes"
    data.labels = data.labels[:10]
    codes, sources = train_ar.extract_codes(small_tokenizer, "one", data, folder, True, dar.Processes(CPU))
    assert codes.shape == (10, 1, 32) and sources.tolist() == list(range(10))
    with pytest.raises(ValueError, match="codes: of another tokenizer .one, now two.; remove it"):
        train_ar.extract_codes(small_tokenizer, "two", data, folder, True, dar.Processes(CPU))
    data.digest = "others"
    with pytest.raises(ValueError, match="of another data"):
        train_ar.extract_codes(small_tokenizer, "one", data, folder, True, dar.Processes(CPU))


@pytest.mark.parametrize("size, dtype", [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_codes_of_any_codebook_are_kept_whole(make_tokenizer, tmp_path, size, dtype):
    tokenizer, data = make_tokenizer(codebook_size=size), training.ImageData("shapes", 32)
    data.labels = data.labels[:40]
    codes, _ = train_ar.extract_codes(tokenizer, "digest", data, tmp_path, True, dar.Processes(CPU))
    expected = tokenizer.encode(train_tokenizer.load_crops(data, range(40)))
    assert codes.dtype == dtype and np.array_equal(codes[:, 0], expected.numpy()) and expected.max() > 2**15
    sample = train_ar.CodeSamples(tmp_path, data, seed=0)[3]
    assert torch.equal(sample[0], expected[training.data_index(3, 40, 0)])


def test_a_disk_without_space_for_the_codes_is_one_line(small_tokenizer, tmp_path, monkeypatch):
    data = training.ImageData("shapes", 32)

    def full(*_):
        raise OSError(28, "No space left on device")

    def extract():
        train_ar.extract_codes(small_tokenizer, "digest", data, tmp_path, True, dar.Processes(CPU))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="codes.npy: 0.00064 GB cannot be written .*No space.*--on-the-fly"):
        extract()
    assert not list(tmp_path.iterdir())
    monkeypatch.delattr(os, "posix_fallocate")  # a Mac has none
    monkeypatch.setattr(train_ar.shutil, "disk_usage", lambda _: train_ar.shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(OSError, match="codes.npy: .*less space"):
        extract()
    assert not list(tmp_path.iterdir())


def test_a_loaders_worker_is_sent_the_path_of_the_codes(small_tokenizer, tmp_path):
    data = training.ImageData("shapes", 32)
    data.labels = data.labels[:100]
    codes, _ = train_ar.extract_codes(small_tokenizer, "digest", data, tmp_path, True, dar.Processes(CPU))
    samples = train_ar.CodeSamples(tmp_path, data, seed=0)
    first = samples[7]
    sent = pickle.dumps(samples)
    assert len(sent) < 3000 < codes.nbytes and torch.equal(pickle.loads(sent)[7][0], first[0])


def test_tokenizing_on_the_fly_trains_the_same(work):
    words = "--tokenizer tokenizer/last.pt --steps 5 --ema --on-the-fly --out fly".split()
    run(*AR, *words, cwd=work)
    assert not (work / "fly" / "codes").exists()
    assert losses(work / "fly") == losses(work / "ar")


def test_the_next_image_takes_an_unreadable_ones_place(tmp_path, make_tokenizer, capsys):
    for i in range(120):
        folder = tmp_path / "data" / ("ant" if i < 51 else "bee")
        folder.mkdir(parents=True, exist_ok=True)
        training.draw_shape(i, 32).save(folder / f"{i:03}.png")
    (tmp_path / "data" / "ant" / "050.png").write_bytes(b"no picture")
    images, tokenizer = training.ImageData(str(tmp_path / "data"), 32), make_tokenizer()
    codes, sources = train_ar.extract_codes(tokenizer, "digest", images, tmp_path, False, dar.Processes(CPU))
    assert sources[50] == 51 and (np.delete(sources, 50) == np.delete(np.arange(120), 50)).all()
    assert "050.png" in capsys.readouterr().err and np.array_equal(codes[50], codes[51])
    samples = train_ar.CodeSamples(tmp_path, images, seed=0)
    pictures = training.Samples(images, train_ar.functools.partial(train_ar.one_crop, size=32), seed=0)
    for position in range(120):  # as on the fly: the label is that of the picture, and the file is counted
        a, b = samples[position], pictures[position]
        assert torch.equal(a[0], tokenizer.encode(dar.to_float(b[0][None]))[0]) and a[1:] == b[1:]


MISTAKES = {
    "validation": ("--val nowhere", "nowhere"),
    "classes": ("--val shapes", "--val shapes: its classes"),
    "width": ("--width 100", "width"),
    "no layers": ("--layers 0", "--layers 0"),
    "dropout": ("--dropout 1.5", "--dropout 1.5"),
    "class dropout": ("--class-dropout 1.5", "--class-dropout 1.5"),
    "epochs": ("--epochs inf", "--epochs inf"),
    "seed": ("--seed 18000000000001", "--seed 18000000000001: expected 0 ... 2147483647"),
    "micro-batch": ("--micro-batch 3", "--micro-batch 3"),
    "another run": ("--out ar --batch 8", "batch was 4, is 8"),
    "without its average": ("--out ar", "ema was True, is False"),
    "guidance": ("--cfg 1 2 3", "(1.0, 2.0, 3.0)"),
    "no tokenizer": ("--tokenizer no.pt", "no.pt"),
    "a Llama": ("--tokenizer ar/last.pt", "expected a tokenizer"),
    "no numbers": ("--tokenizer nan.pt", "nan.pt"),
    "out is a file": ("--out nan.pt", "nan.pt"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_work_is_refused_before_tokenizing(work, monkeypatch, mistake):
    words, named = MISTAKES[mistake]
    tokenizer = dar.load_tokenizer(work / "tokenizer" / "last.pt")
    tokenizer.quantize.embedding.weight.data[3, 3] = float("nan")
    dar.save_checkpoint(work / "nan.pt", tokenizer)
    monkeypatch.chdir(work)
    monkeypatch.setattr(train_ar.tqdm, "__iter__", lambda _: pytest.fail("it tokenizes"))
    monkeypatch.setattr(sys, "argv", [*AR, *"--tokenizer tokenizer/last.pt --out o --steps 9".split(), *words.split()])
    before = sorted((work / "ar").iterdir())
    kind = FloatingPointError if mistake == "no numbers" else (ValueError, OSError)
    with pytest.raises(kind) as refused:
        train_ar.main()
    assert named in str(refused.value) and len(str(refused.value).splitlines()) == 1
    assert sorted((work / "ar").iterdir()) == before and not (work / "o").exists()


def test_weights_that_are_no_numbers_start_no_training(work, monkeypatch):
    tokenizer = dar.load_tokenizer(work / "tokenizer" / "last.pt")
    tokenizer.quant_out.weight.data[:] = float("inf")
    dar.save_checkpoint(work / "inf.pt", tokenizer)
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", [*TOKENIZER, *"--init inf.pt --steps 2 --out o".split()])
    with pytest.raises(FloatingPointError, match="inf.pt"):  # exit 3
        train_tokenizer.main()


@pytest.mark.slow
def test_a_llama_learns_32_images_by_heart(tmp_path, make_tokenizer):
    tokenizer, pictures = make_tokenizer(), []
    dar.save_checkpoint(tmp_path / "tokenizer.pt", tokenizer)
    for i in range(32):  # a class each; symmetric, so that image and mirror have the same codes
        colours = np.random.default_rng(i).integers(0, 256, (4, 2, 3)).astype(np.uint8)
        half = colours.repeat(8, 0).repeat(8, 1)  # eight squares
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


@pytest.mark.slow
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
        alone = dict(start_new_session=True)  # so that all that it starts can be ended with it
        return subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True, **alone)

    first = job(100_000)
    try:
        wait_for(has_rows(tmp_path / "run", 3), first)
        first.send_signal(signal.SIGTERM)
        assert first.wait(300) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)  # whatever was not told to stop
    calls = (tmp_path / "calls").read_text()
    assert f"requeue {os.getpid()}" in calls and f"--signal=TERM {os.getpid()}.0" in calls
    done = dar.read_checkpoint(tmp_path / "run" / "last.pt")["training"]["step"]
    assert done >= 3
    for _ in range(3):
        second = job(done + 2)
        _, errors = second.communicate(timeout=300)
        if GLOO_ABORTS not in errors:
            break
    assert second.returncode == 0, errors[-3000:]
    assert dar.read_checkpoint(tmp_path / "run" / "last.pt")["training"]["step"] == done + 2
    assert (tmp_path / "calls").read_text() == calls  # an end is no reason to queue again
