"""What a cluster would stumble over, found without one."""

import argparse
import datetime
import signal
import subprocess

import numpy as np
import pytest
import torch
import torch.distributed as dist
from command_lines import TOKENIZER, command, environment, has_rows, log, wait_for
from torch._inductor import compile_fx
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import dar
import train_ar
import train_tokenizer
from common import speed
from common.cli import command_line
from common.distributed import Processes, start_processes
from common.plan import Cost, ar_cost, needed_bytes, refuse_if_too_large, tokenizer_cost
from common.training import ImageData, wrap_model


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


@pytest.mark.slow
def test_v1_recipe_fits_80_gb():
    config = dar.TOKENIZER_PRESETS["v1"]
    recipe = train_tokenizer.RECIPES["v1"]
    cost = tokenizer_cost(config, recipe["times"], lpips=True, repa=True)
    model = on_meta(dar.SequentialDiffusionTokenizer, config)
    assert 1.2e9 < cost.saved < 1.4e9  # 1.305 GB by another count
    assert needed_bytes(model, True, cost, recipe["micro_batch"]) < 70e9
    assert needed_bytes(model, True, cost, 128) > 80e9  # the share of one of 8 GPUs


@pytest.mark.slow
def test_xl_recipe_fits_80_gb():
    config = dar.AR_PRESETS["XL"]
    cost = ar_cost(config)
    model = on_meta(dar.ARTransformer, config)
    assert 0.7e9 < cost.saved < 0.8e9  # 0.75 GB by another count
    assert needed_bytes(model, False, cost, train_ar.RECIPES["XL"]["micro_batch"]) < 70e9
    assert needed_bytes(model, False, cost, 128) > 80e9


def test_products_of_a_linear_model_by_hand():
    config = dar.AR_PRESETS["shapes"]
    model = on_meta(dar.ARTransformer, config)
    tables = model.tok_embeddings.weight.numel() + model.cls_embedding.weight.numel()
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    matrices = sum(p.numel() for p in model.parameters()) - tables - norms
    forward = 2 * matrices * config.num_tokens  # a product and a sum for each weight and token
    assert ar_cost(config).products == pytest.approx(3 * forward, rel=1e-6)


def test_what_does_not_fit_is_refused():
    model = torch.nn.Linear(1, 1)
    cost = Cost(saved=1e9)  # bytes an image; a tenth is added
    refuse_if_too_large(model, False, cost, 64, available=71e9)
    with pytest.raises(ValueError, match="--micro-batch 64 needs about 70 GB.*--micro-batch 16"):
        refuse_if_too_large(model, False, cost, 64, available=20e9)
    with pytest.raises(ValueError, match="--checkpoint-blocks"):
        refuse_if_too_large(model, False, cost, 64, available=1e9)


def test_processes_wait_for_hours(monkeypatch):
    options = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: options.update(more))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    start_processes("cpu")
    assert options["timeout"] >= datetime.timedelta(hours=1)


@pytest.mark.parametrize("error, destroyed", [(None, True), (ValueError("no"), False)])
def test_only_a_clean_end_waits_for_the_others(monkeypatch, error, destroyed):
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(1))

    def main():
        if error is not None:
            raise error

    with pytest.raises(SystemExit):
        command_line(main)
    assert bool(calls) == destroyed


@pytest.mark.parametrize("recipe", [train_tokenizer.RECIPES["v1"], train_ar.RECIPES["XL"]])
def test_large_recipes_save_and_draw_rarely(recipe):
    assert recipe["save_every"] >= 5000
    assert recipe["picture_every"] >= 5000


# The last save


@pytest.mark.slow
@pytest.mark.parametrize("patience, saved", [(2, False), (60, True)])
def test_torchrun_waits_for_a_slow_save_as_long_as_it_is_told(tmp_path, patience, saved):
    """By TORCH_ELASTIC_SHUTDOWN_TIMEOUT, which experiments/slurm.sh sets."""
    words = [*TOKENIZER, *"--steps 100000 --save-every 100000 --out run".split()]
    process = subprocess.Popen(
        command(*words, processes=2, probe=True),
        cwd=tmp_path,
        env=environment(TORCH_ELASTIC_SHUTDOWN_TIMEOUT=patience, SLOW_SAVE=8),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(has_rows(tmp_path / "run", 2), process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert (tmp_path / "run" / "last.pt").exists() == saved
    if saved:
        training = dar.read_checkpoint(tmp_path / "run" / "last.pt")["training"]
        assert training["step"] == len(log(tmp_path / "run"))


# Nobody waits for process 0 while it measures


class OneOf(Processes):
    """One of the processes, alone: it sees its own part of each sum."""

    def all_reduce(self, value, operation="SUM"):
        return value


def test_each_process_measures_its_part_of_the_images(small_tokenizer, monkeypatch):
    encode = small_tokenizer.encode
    seen = []

    def counted(images):
        seen.append((len(images), torch.is_autocast_enabled("cpu")))
        return encode(images)

    monkeypatch.setattr(small_tokenizer, "encode", counted)
    data = ImageData("shapes", 32, held_out=True)
    autocast = torch.autocast("cpu", torch.bfloat16)
    parts = []
    for rank in range(2):
        one = OneOf(torch.device("cpu"), rank, 2)
        train_tokenizer.held_out(small_tokenizer, data, 100, one, autocast)
        parts.append(seen.copy())
        seen.clear()
    assert parts == [[(50, True)], [(50, True)]]


def test_each_process_measures_its_part_of_the_codes(make_ar, small_tokenizer, monkeypatch):
    ar = make_ar()
    ar.attach_tokenizer(small_tokenizer)
    codes = np.random.default_rng(0).integers(64, size=(1000, 32))
    labels = np.zeros(1000, np.int64)
    autocast = torch.autocast("cpu", torch.bfloat16)
    seen = []
    forward = ar.forward

    def counted(tokens, classes):
        seen.append((len(tokens), torch.is_autocast_enabled("cpu")))
        return forward(tokens, classes)

    monkeypatch.setattr(ar, "forward", counted)
    for rank in range(2):
        train_ar.held_out(ar, codes, labels, OneOf(torch.device("cpu"), rank, 2), autocast)
        assert seen == [(250, True)] * 4  # half of 1000, once with each of two sets of labels
        seen.clear()


# What keeps a GPU waiting


def tokenizer_losses(model, batch: int = 2):
    size = model.config.image_size
    images = torch.zeros(batch, 3, size, size)
    s = torch.rand(batch, 2)
    out = model(images, s, torch.zeros(batch, 2, 3, size, size))
    return sum(dar.tokenizer_loss(out, images).values())


def llama_loss(model, batch: int = 2):
    codes = torch.zeros(batch, model.config.num_tokens, dtype=torch.int64)
    return dar.ar_loss(model, codes, torch.zeros(batch, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["tokenizer", "llama"])
def test_losses_never_read_a_number_back(kind, make_tokenizer, make_ar):
    """item() and its like, for which a GPU must have finished, cannot run on fake tensors."""
    model = make_tokenizer() if kind == "tokenizer" else make_ar()
    losses = tokenizer_losses if kind == "tokenizer" else llama_loss
    model = model.to("meta").train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = losses(model.to_empty(device="cpu"))
        loss.backward()
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.parametrize("kind", ["tokenizer", "llama"])
def test_losses_compile_into_one_graph(kind, make_tokenizer, make_ar):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = make_tokenizer() if kind == "tokenizer" else make_ar()
    losses = tokenizer_losses if kind == "tokenizer" else llama_loss
    torch._dynamo.reset()
    losses(torch.compile(model.train(), backend=backend)).backward()
    assert len(graphs) == 1


@pytest.fixture
def process_group(tmp_path):
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/x", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_cuts_xl_into_few_graphs(process_group, monkeypatch):
    """torch cuts a compiled model where a bucket of gradients ends."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        "common.training.quiet_compile", lambda m: torch.compile(m, backend=backend)
    )
    layers = 4
    config = dar.ARConfig(1280, layers, num_tokens=16)
    args = argparse.Namespace(checkpoint_blocks=False, compile=True)
    torch._dynamo.reset()
    model = dar.ARTransformer(config)
    parallel = wrap_model(model, args, Processes(torch.device("cpu"), 0, 2))
    codes = torch.zeros(1, 16, dtype=torch.int64)
    dar.ar_loss(parallel, codes, torch.zeros(1, dtype=torch.int64)).backward()
    assert 1 <= len(graphs) <= layers


def test_cuda_graph_of_a_token_writes_only_fixed_memory(make_ar, monkeypatch):
    """reduce-overhead falls back, silently, from CUDA graphs to launches one by one if a step
    writes into a tensor that may lie elsewhere the next time."""
    found = []

    def recording(graph, inputs, **options):
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        written = [
            placeholders.index(node.args[0])
            for node in graph.graph.nodes
            if node.target is torch.ops.aten.copy_.default and node.args[0] in placeholders
        ]
        found.append((written, options["static_input_idxs"]))
        return graph

    def backend(graph, inputs):
        with torch._inductor.config.patch(force_disable_caches=True):
            return compile_fx.compile_fx(graph, inputs, inner_compile=recording)

    def compile(function, mode, **options):
        return torch.compile(function, backend=backend, **options)

    monkeypatch.setattr(speed, "quiet_compile", compile)
    ar = speed.prepare_for_sampling(make_ar(num_tokens=8), compile=True)
    torch._dynamo.reset()
    ar.generate(torch.tensor([1]), seeds=0)
    assert len(found) == 1
    written, static = found[0]
    assert len(written) == 2 * ar.config.layers  # keys and values
    assert set(written) <= set(static)
