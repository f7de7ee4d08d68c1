"""prepare_for_sampling(compile=True): the compiled step draws the same, is compiled rarely, and keeps to what torch's
CUDA graphs demand, as far as a CPU can tell."""

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import dar

pytestmark = pytest.mark.slow
LABELS = torch.tensor([3, 7])


@pytest.fixture
def models(make_ar, make_tokenizer):
    """Two Llamas and their tokenizers with the same weights, 96 tokens; one pair is for compiling."""
    torch._dynamo.reset()
    counters.clear()
    pairs = []
    for _ in range(2):
        ar = make_ar(num_tokens=96)
        ar.attach_tokenizer(make_tokenizer(num_tokens=96, max_tokens=96))
        pairs.append(ar)
    return pairs


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def test_compiled_models_draw_the_same_and_are_compiled_once_a_shape(models):
    plain, ar = models
    assert dar.prepare_for_sampling(dar.prepare_for_sampling(ar, compile=True), compile=True) is ar  # twice is once
    settings = dict(cfg=(1.1, 8.0), greedy=True)
    expected = plain.generate(LABELS, **settings)
    assert torch.equal(ar.generate(LABELS, **settings), expected)
    assert compilations() == 2  # the caches are read 64 or all 96 places far
    for settings in (dict(prefix=expected[:, :5], seeds=0, cfg=3.0), dict(seeds=5), dict(seeds=7, top_k=9)):
        assert torch.equal(ar.generate(LABELS.flip(0), **settings), plain.generate(LABELS.flip(0), **settings))
    assert compilations() == 2
    noise = torch.randn(2, 3, 32, 32)
    pictures = [model.tokenizer.decode(expected, noise) for model in models]
    torch.testing.assert_close(pictures[1], pictures[0], rtol=1e-4, atol=1e-4)
    ar.tokenizer.previews(expected, noise, num_steps=5)
    assert compilations() == 3  # one serves all denoising steps
    assert not counters["graph_break"]


def test_what_a_compiled_step_writes_to_is_static(models, monkeypatch):
    """Else torch's CUDA graphs refuse the step, or copy the caches at every token."""
    written = []

    def backend(graph, inputs):
        places = {node: i for i, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
        for node in graph.graph.nodes:
            if "index_copy_" in str(node.target):
                written.append(inputs[places[node.args[0]]])
        return graph.forward

    monkeypatch.setattr(dar, "quiet_compile", lambda f, **_: torch.compile(f, backend=backend, dynamic=False))
    _, ar = models
    dar.prepare_for_sampling(ar, compile=True)
    ar.generate(LABELS[:1], seeds=0, cfg=None)
    assert len(written) >= 2 * len(ar.layers)
    assert all(getattr(buffer, "_dynamo_static_input_type", None) for buffer in written)


def test_steps_that_return_the_same_memory_every_time_draw_the_same(models, monkeypatch):
    """As CUDA graphs do: what a step returned is written over by the next."""
    memory = {}

    def stand_in(function, **_):
        def call(*inputs):
            result = function(*inputs)
            kept = memory.setdefault((function.__name__, result.shape), torch.empty_like(result))
            return kept.copy_(result)

        return call

    plain, ar = models
    monkeypatch.setattr(dar, "quiet_compile", stand_in)
    dar.prepare_for_sampling(ar, compile=True)
    for solver in ("euler", "ab2"):
        steps = [list(dar.stream(model, model.tokenizer, LABELS, seeds=0, solver=solver)) for model in models]
        for a, b in zip(*steps):
            assert torch.equal(a.codes, b.codes)
            torch.testing.assert_close(a, b)
    assert len(memory) == 2


def test_caches_are_used_again_but_not_by_two_pictures_at_once(models, monkeypatch):
    plain, ar = models
    monkeypatch.setattr(dar, "quiet_compile", lambda function, **_: function)
    dar.prepare_for_sampling(ar, compile=True)
    first = ar.new_caches(2, 96)
    memory = first[0].k.data_ptr()
    assert ar.new_caches(2, 96)[0].k.data_ptr() != memory  # while the first is in use
    first[0].k.fill_(torch.inf)
    alive = weakref.ref(first[0])
    del first
    assert alive() is None
    again = ar.new_caches(2, 96)
    memory = again[0].k.data_ptr()
    del again
    caches = ar.new_caches(2, 96)
    assert caches[0].k.data_ptr() == memory and not any(c.k.any() or c.v.any() for c in caches)
    del caches
    streams = [dar.generate_groups(ar, LABELS, 12, seeds=seed) for seed in (0, 9)]
    together = [torch.cat(groups, 1) for groups in zip(*zip(*streams))]
    for codes, seed in zip(together, (0, 9)):
        assert torch.equal(codes, plain.generate(LABELS, seeds=seed))


def test_caches_made_in_inference_mode_serve_outside_of_it_too(models, monkeypatch):
    plain, ar = models
    monkeypatch.setattr(dar, "quiet_compile", lambda function, **_: function)
    dar.prepare_for_sampling(ar, compile=True)
    with torch.inference_mode():
        codes = ar.generate(LABELS, seeds=0)
    assert torch.equal(ar.generate(LABELS, seeds=0), codes)


def test_compiling_says_nothing(tmp_path):
    program = (
        "import torch, dar\n"
        "ar = dar.ARTransformer(dar.ARConfig(64, 1, 16, 2, 4)).eval()\n"
        "dar.prepare_for_sampling(ar, compile=True).generate(torch.tensor([0]), seeds=0)\n"
    )
    command = [sys.executable, "-W", "ignore:Guards may run slower", "-c", program]  # said on Python 3.13.0 alone
    done = subprocess.run(command, cwd=Path(dar.__file__).parent, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, compiled dropout draws its own numbers")
def test_a_compiled_training_step_drops_what_the_plain_one_drops(make_ar):
    ar = make_ar(dropout=0.5).train()
    codes, losses = torch.randint(64, (4, 32)), []
    for model in (ar, dar.quiet_compile(ar)):
        for seed in (1, 2):
            torch.manual_seed(seed)
            losses.append(
                dar.ar_loss(model, codes, torch.arange(4), torch.zeros(4).bool(), ar.config.num_classes).item()
            )
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5) and abs(losses[0] - losses[1]) > 1e-3
