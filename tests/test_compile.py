"""Chapter 10, compile_for_sampling: compiled blocks, and steps that are recorded once and replayed."""

import shutil
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dar

CPU = torch.device("cpu")
LABELS = torch.tensor([3, 7])
SETTINGS = {
    "guided": dict(cfg=(1.1, 8.0), seeds=5),
    "no guidance": dict(cfg=None, seeds=5),
    "greedy": dict(cfg=4.0, greedy=True),
    "filtered": dict(cfg=4.0, seeds=5, temperature=0.8, top_k=20, top_p=0.9),
    "prefix": dict(cfg=4.0, seeds=5, prefix=torch.arange(37)),
    "all but one token": dict(cfg=4.0, seeds=5, prefix=torch.arange(79) % 64),
    "fewer tokens": dict(cfg=4.0, seeds=5, num_tokens=41),
}


class Recorder(TorchDispatchMode):
    """Does on a CPU what a CUDA graph does: it keeps each operation with the memory it worked on, and does it again
    there, whatever Python's numbers have become since."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, out))
        return out

    def pool(self):
        return None

    @torch.inference_mode()  # as a graph, it does not care in which mode a tensor was made
    def replay(self):
        self.replays += 1
        for operation, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(operation(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch) -> list[Recorder]:
    """Stands in for CUDA's graphs; the list of all that were recorded."""
    recorded = []

    def new():
        recorded.append(Recorder())
        return recorded[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: graph)
    return recorded


@pytest.fixture
def ar(make_ar) -> dar.ARTransformer:
    return make_ar(num_tokens=80)  # three blocks of random numbers, the last one half


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_replayed_steps_draw_the_same_tokens(graphs, ar, setting):
    again = dict(setting, seeds=9) if "seeds" in setting else setting
    expected = ar.generate(LABELS, **setting), ar.generate(LABELS + 1, **again)
    ar.compiled = ar.replays = True
    assert torch.equal(ar.generate(LABELS, **setting), expected[0])
    count = len(graphs)
    assert torch.equal(ar.generate(LABELS + 1, **again), expected[1])  # with what the first call left in the caches
    assert len(graphs) == count  # recordings serve the next pictures too


def test_one_recording_a_block_serves_all_its_tokens(graphs, ar):
    ar.compiled = ar.replays = True
    ar.generate(LABELS, seeds=1)
    assert [graph.replays for graph in graphs] == [31, 32, 16]  # the first token comes with the class
    ar.generate(LABELS, seeds=2)
    assert [graph.replays for graph in graphs] == [62, 64, 32]
    ar.generate(LABELS[:1], seeds=2)  # another batch
    assert len(graphs) == 6


def test_two_streams_of_one_model_do_not_disturb_each_other(graphs, ar):
    expected = [torch.cat([*dar.generate_groups(ar, LABELS, group_size=8, seeds=s)], 1) for s in (1, 2)]
    ar.compiled = ar.replays = True
    ar.generate(LABELS, seeds=3)  # leaves recordings, which only one of the two can have
    streams = [dar.generate_groups(ar, LABELS, group_size=8, seeds=s) for s in (1, 2)]
    found = [torch.cat(parts, 1) for parts in zip(*zip(*streams))]
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_replayed_denoising_steps_end_in_the_same_picture(graphs, make_tokenizer):
    tokenizer = make_tokenizer()
    codes, noise = torch.randint(64, (3, 32)), torch.randn(2, 3, 3, 32, 32)
    expected = [tokenizer.decode(codes, x0) for x0 in noise], tokenizer.previews(codes, noise[0])
    tokenizer.velocity = dar.Replayed(tokenizer.velocity)
    found = [tokenizer.decode(codes, x0) for x0 in noise], tokenizer.previews(codes, noise[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [graph.replays for graph in graphs] == [24]
    tokenizer.decode(codes, torch.randn(3, 3, 64, 32))  # another size is another recording
    assert [graph.replays for graph in graphs] == [24, 8]


def test_what_a_replay_returned_outlives_the_next_one(graphs):
    double = dar.Replayed(lambda x: 2 * x)
    first, second = double(torch.ones(2)), double(torch.full((2,), 5.0))
    assert first.tolist() == [2, 2] and second.tolist() == [10, 10]


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_models_draw_the_same_pictures(make_ar, make_tokenizer):
    ar, tokenizer, noise = make_ar(), make_tokenizer(), torch.randn(2, 3, 32, 32)
    codes = ar.generate(LABELS, greedy=True)
    picture = tokenizer.decode(codes, noise)
    assert dar.compile_for_sampling(ar) is ar
    dar.compile_for_sampling(tokenizer)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(ar.generate(LABELS, greedy=True), codes)
    torch.testing.assert_close(tokenizer.decode(codes, noise), picture, rtol=0, atol=1e-4)
    # One graph for the step of a token, one for the denoising step: not one for each block, token or prefix.
    ar.generate(LABELS, greedy=True, prefix=codes[:, :9])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True], ids=["graphs", "graphs and compiled"])
def test_on_a_gpu_recorded_steps_draw_the_same_pictures(make_ar, make_tokenizer, compiled):
    ar, tokenizer, labels = make_ar(num_tokens=32).cuda(), make_tokenizer().cuda(), LABELS.cuda()
    noise = torch.randn(2, 3, 32, 32, device="cuda")
    codes = ar.generate(labels, greedy=True)
    picture = tokenizer.decode(codes, noise)
    if compiled:
        dar.compile_for_sampling(ar), dar.compile_for_sampling(tokenizer)
    else:
        ar.compiled = ar.replays = True
        tokenizer.velocity = dar.Replayed(tokenizer.velocity)
    for _ in range(2):
        assert torch.equal(ar.generate(labels, greedy=True), codes)
        torch.testing.assert_close(tokenizer.decode(codes, noise), picture, rtol=0, atol=1e-3)


def test_recordings_outlive_generators_that_are_left_half_way(graphs, ar):
    ar.compiled = ar.replays = True
    for _ in range(3):
        next(dar.generate_groups(ar, LABELS, group_size=8, seeds=1))
    assert len(graphs) == 1


def test_memory_of_one_batch_is_kept_at_most(graphs, ar):
    ar.compiled = ar.replays = True
    ar.generate(LABELS, seeds=1)
    made = weakref.ref(*[step for step, _ in ar.recorded.values()])
    ar.generate(LABELS[:1], seeds=1)
    assert len(ar.recorded) == 1 and made() is None


def test_numbers_that_overflowed_in_one_picture_do_not_reach_the_next(graphs, ar):
    ar.compiled = ar.replays = True
    expected = ar.generate(LABELS, seeds=1)
    ((step, _),) = ar.recorded.values()
    step.caches[0].v[:, :, 40] = torch.inf
    assert torch.equal(ar.generate(LABELS, seeds=1), expected)


def test_inference_mode_leaves_recordings_that_serve_no_grad_too(graphs, ar, make_tokenizer):
    ar.compiled = ar.replays = True
    tokenizer, noise = make_tokenizer(), torch.randn(2, 3, 32, 32)
    tokenizer.velocity = dar.Replayed(tokenizer.velocity)
    with torch.inference_mode():
        codes = ar.generate(LABELS, seeds=1)
        picture = tokenizer.decode(codes[:, :32] % 64, noise)
    assert torch.equal(ar.generate(LABELS, seeds=1), codes)
    assert torch.equal(tokenizer.decode(codes[:, :32].clone() % 64, noise), picture)


def test_gradients_are_not_lost_in_a_replay(graphs):
    x = torch.ones(2, requires_grad=True)
    dar.Replayed(lambda x: (2 * x).sum())(x).backward()
    assert x.grad.tolist() == [2, 2] and not graphs


def test_compiling_twice_changes_nothing_more(make_ar, make_tokenizer, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: None)
    tokenizer = make_tokenizer()
    tokenizer.velocity = replayed = dar.Replayed(tokenizer.velocity)
    assert dar.compile_for_sampling(dar.compile_for_sampling(tokenizer)).velocity is replayed


def test_tokens_are_drawn_under_autocast_too(ar):
    for compiled in (False, True):
        ar.compiled = compiled
        with torch.autocast("cpu", torch.bfloat16):
            assert ar.generate(LABELS, seeds=1).shape == (2, 80)
