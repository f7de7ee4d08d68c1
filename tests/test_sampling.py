"""Chapter 7, sampling: guidance, random numbers, the cache, the flow's steps, streaming."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import dar

CPU = torch.device("cpu")
LABELS = torch.tensor([3, 7])


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(64, (2, 32))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def count_runs():
    """A function that returns a list, to which each run of a module adds the shape of its input."""
    hooks = []

    def count(module: torch.nn.Module) -> list[torch.Size]:
        runs = []
        note = lambda module, args: runs.append(args[0].shape)  # noqa: E731
        hooks.append(module.register_forward_pre_hook(note))
        return runs

    yield count
    for hook in hooks:
        hook.remove()


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Guidance


def test_guidance_rises_from_the_first_token_to_the_last():
    assert dar.guidance_schedule((1.0, 8.0), 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert dar.guidance_schedule([9.0, 1.0], 3) == [9, 5, 1]
    assert dar.guidance_schedule(1.5, 4) == [1.5] * 4
    assert dar.guidance_schedule((1.1, 8.0), 1) == [1.1]


def test_guidance_schedule_of_the_authors(golden_ar):
    start, end = map(float, str(golden_ar["cfg_scale"]).split(","))
    assert dar.guidance_schedule((start, end), 32) == pytest.approx(golden_ar["cfg_schedule"])


def test_guidance_exaggerates_what_the_class_changes():
    with_class, without = torch.randn(2, 3, 8)
    logits = torch.cat((with_class, without))
    assert_close(dar.guide(logits, 1.0), with_class)
    assert_close(dar.guide(logits, 0.0), without)
    assert_close(dar.guide(logits, 3.0), with_class + 2 * (with_class - without))


@pytest.mark.parametrize("cfg, copies", [(None, 1), (1, 1), ((1.0, 1.0), 1), ((1.0, 4.0), 2)])
def test_without_guidance_the_model_is_asked_once(small_ar, count_runs, cfg, copies):
    runs = count_runs(small_ar.norm)
    small_ar.generate(LABELS, cfg=cfg, seeds=0)
    assert {shape[0] for shape in runs} == {copies * len(LABELS)}


@pytest.mark.parametrize("cfg", ["4", (1.0, 2.0, 3.0), (1.0,), math.nan, (1.0, math.inf)])
def test_guidance_of_another_form_is_refused(small_ar, cfg):
    with pytest.raises(ValueError, match="guidance"):
        small_ar.generate(LABELS, cfg=cfg)


# From logits to a token


def kept(logits: list[float], **settings) -> list[int]:
    """The tokens that filter_logits leaves."""
    filtered = dar.filter_logits(torch.tensor([logits]), **settings)
    return filtered[0].isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 99])
def test_top_k_keeps_exactly_k(top_k):
    assert kept([2.0, 5.0, 2.0, 2.0], top_k=top_k) == sorted([1, 0, 2, 3][:top_k])


@pytest.mark.parametrize("top_p, count", [(0.01, 1), (0.49, 1), (0.51, 2), (0.71, 3), (0.89, 4)])
def test_top_p_keeps_the_least_set_of_that_mass(top_p, count):
    logits = np.log([0.18, 0.5, 0.12, 0.2]).tolist()
    assert kept(logits, top_p=top_p) == sorted([1, 3, 0, 2][:count])


@pytest.mark.parametrize("top_p, count", [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_of_equal_tokens_the_earlier_is_the_likelier(top_p, count):
    assert kept([1.0, 1.0, 1.0, 1.0], top_p=top_p) == list(range(count))


def test_temperature_comes_before_top_k_before_top_p():
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    assert kept(logits, top_p=0.38) == [0]
    assert kept(logits, top_p=0.38, temperature=2.0) == [0, 1]  # at T = 2 the first has 0.33
    assert kept(logits, top_p=0.5) == [0, 1]
    assert kept(logits, top_p=0.5, top_k=2) == [0]  # of the two that stay the first has 0.57


@pytest.fixture(scope="module")
def bigram(make_ar) -> dar.ARTransformer:
    """Its only layer adds nothing. So a token depends on the one before alone."""
    model = make_ar(layers=1, vocab_size=8, num_tokens=4)
    with torch.no_grad():
        model.layers[0].attention.wo.weight.zero_()
        model.layers[0].feed_forward.w2.weight.zero_()
    return model


@torch.no_grad()
@pytest.mark.parametrize("cfg", [None, 3.0])
@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0, "top_k": 5, "top_p": 0.8}])
def test_tokens_are_drawn_from_the_softmax(bigram, cfg, settings):
    nothing = torch.empty(2, 0, dtype=torch.int64)
    logits = bigram(nothing, torch.tensor([2, 10]))[:, 0]  # with class 2, and without
    guided = dar.guide(logits, 1.0 if cfg is None else cfg)
    filtered = dar.filter_logits(guided, **settings)[0]
    expected = 4000 * filtered.double().softmax(-1)
    labels = torch.full((4000,), 2)
    drawn = bigram.generate(labels, num_tokens=1, cfg=cfg, seeds=0, **settings)
    counts = drawn[:, 0].bincount(minlength=8)
    possible = expected > 0
    assert not counts[~possible].any()
    assert chisquare(counts[possible], expected[possible]).pvalue > 0.001


@torch.no_grad()
def test_tokens_are_independent_but_for_the_model(bigram):
    codes = bigram.generate(torch.full((6000,), 2), num_tokens=2, cfg=None, seeds=0)
    logits = bigram(torch.arange(8)[:, None], torch.full((8,), 2)).double()
    first = logits[0, 0].softmax(-1)
    second = logits[:, 1].softmax(-1)  # row by row, after each first token
    pairs = (codes[:, 0] * 8 + codes[:, 1]).bincount(minlength=64)
    expected = 6000 * (first[:, None] * second).flatten()
    assert chisquare(pairs, expected).pvalue > 0.001
    neighbours = (codes[::2, 0] * 8 + codes[1::2, 0]).bincount(minlength=64)
    expected = 3000 * torch.outer(first, first).flatten()
    assert chisquare(neighbours, expected).pvalue > 0.001


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_at_the_end_of_each_scale_sampling_is_greedy(small_ar, setting):
    greedy = small_ar.generate(LABELS, greedy=True)
    assert torch.equal(small_ar.generate(LABELS, seeds=5, **setting), greedy)
    assert torch.equal(small_ar.generate(LABELS, greedy=True, **setting), greedy)


# Random numbers


@pytest.fixture(scope="module")
def dice() -> dar.ARTransformer:
    """Fresh, so all logits are 0: its tokens are the random numbers laid bare."""
    config = dar.ARConfig(64, 1, vocab_size=64, num_classes=10, num_tokens=80)
    return dar.ARTransformer(config).eval()


def test_a_pictures_random_numbers_are_its_seeds(dice):
    seeds = [11, 4, 2**31 - 1]
    together = dice.generate(torch.tensor([0, 1, 2]), seeds=seeds)
    for seed, codes in zip(seeds, together):
        alone = dice.generate(torch.tensor([9]), seeds=[seed], cfg=None)
        assert torch.equal(alone[0], codes)
    assert len(together.unique(dim=0)) == 3


def test_random_numbers_do_not_repeat_in_a_picture(dice):
    codes = dice.generate(torch.tensor([0]), seeds=0)[0]
    assert not torch.equal(codes[:32], codes[32:64])  # 32 tokens are drawn at a time
    assert len(codes.unique()) > 30


def test_noise_and_tokens_of_a_seed_are_not_coupled():
    generators = [g for purpose in (0, 1) for g in dar.picture_generators(range(99), purpose, CPU)]
    assert len({g.initial_seed() for g in generators}) == 2 * 99


def test_a_pictures_noise_is_its_seeds():
    together = dar.initial_noise([5, 6], 16, CPU)
    assert torch.equal(dar.initial_noise([6], 16, CPU)[0], together[1])
    assert not torch.equal(together[0], together[1])
    assert together.std().item() == pytest.approx(1, abs=0.1)


def test_seeds_leave_the_global_random_state_alone(small_ar, small_tokenizer):
    before = torch.get_rng_state()
    list(dar.stream(small_ar, small_tokenizer, LABELS, seeds=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_dtype_changes_nothing(small_ar, small_tokenizer):
    before = list(dar.stream(small_ar, small_tokenizer, LABELS, seeds=0, top_p=0.9))[-1]
    torch.set_default_dtype(torch.float64)
    try:
        after = list(dar.stream(small_ar, small_tokenizer, LABELS, seeds=0, top_p=0.9))[-1]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.x, before.x)


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_do_not_depend_on_the_batch(small_ar, batch):
    labels = torch.arange(8)
    parts = [
        small_ar.generate(labels[i : i + batch], seeds=list(range(i, min(i + batch, 8))))
        for i in range(0, 8, batch)
    ]
    assert torch.equal(torch.cat(parts), small_ar.generate(labels, seeds=0))


# The cache


def test_greedy_tokens_of_the_authors(authors_ar, golden_ar):
    cfg = tuple(map(float, str(golden_ar["cfg_scale"]).split(",")))
    codes = authors_ar.generate(torch.from_numpy(golden_ar["labels"]), cfg=cfg, greedy=True)
    assert torch.equal(codes, torch.from_numpy(golden_ar["greedy"]))


@torch.no_grad()
@pytest.mark.parametrize("cfg", [None, 2.5, (1.1, 8.0)])
@pytest.mark.parametrize("num_tokens", [32, 8])
@pytest.mark.parametrize("given", [0, 5])
def test_generation_equals_the_model_without_a_cache(small_ar, codes, cfg, num_tokens, given):
    scales = dar.guidance_schedule(cfg, num_tokens) or [1.0] * num_tokens
    drawn = codes[:, :given]
    for i in range(given, num_tokens):
        with_class = small_ar(drawn, LABELS)[:, -1]
        without = small_ar(drawn, torch.full_like(LABELS, 10))[:, -1]
        logits = without + scales[i] * (with_class - without)
        drawn = torch.cat((drawn, logits.argmax(-1, keepdim=True)), 1)
    generated = small_ar.generate(LABELS, num_tokens, cfg, greedy=True, prefix=codes[:, :given])
    assert torch.equal(generated, drawn)


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1] * 33, [33], [12, 1, 1, 19]])
def test_a_sampling_step_gives_the_models_logits(small_ar, codes, parts):
    caches = small_ar.new_caches(batch=2, length=40)  # some positions are never written
    position = torch.arange(33)
    end = 0
    for x in small_ar.embed(codes, LABELS).split(parts, 1):
        start, end = end, end + x.shape[1]
        logits = small_ar.next_logits(x, position[start:end], caches)
        expected = small_ar(codes[:, : end - 1], LABELS)[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_model_runs_on_each_token_once(small_ar, count_runs):
    runs = count_runs(small_ar.norm)
    small_ar.generate(LABELS, seeds=0)
    assert [shape[1] for shape in runs] == [1] * 32


def test_a_prefix_is_read_at_once(small_ar, count_runs):
    runs = count_runs(small_ar.norm)
    small_ar.generate(LABELS, seeds=0, prefix=torch.arange(12))
    assert [shape[1] for shape in runs] == [13] + [1] * 19  # first class and prefix


@pytest.mark.parametrize("given", [1, 31, 32, 33, 80])
def test_a_prefix_does_not_shift_the_random_numbers(dice, given):
    free = dice.generate(LABELS, seeds=8)
    prefix = (free[:, :given] + 1) % 64
    codes = dice.generate(LABELS, seeds=8, prefix=prefix)
    assert torch.equal(codes[:, :given], prefix)
    assert torch.equal(codes[:, given:], free[:, given:])


# Groups


@pytest.mark.parametrize("group_size", [4, 5, 32])
def test_groups_joined_are_what_generate_returns(small_ar, group_size):
    groups = list(dar.generate_groups(small_ar, LABELS, group_size, seeds=4))
    assert [group.shape[1] for group in groups[:-1]] == [group_size] * (len(groups) - 1)
    assert torch.equal(torch.cat(groups, 1), small_ar.generate(LABELS, seeds=4))


def test_a_group_comes_as_soon_as_it_is_full(small_ar, count_runs):
    runs = count_runs(small_ar.norm)
    for k, _ in enumerate(dar.generate_groups(small_ar, LABELS, group_size=4, seeds=0)):
        assert len(runs) == 4 * (k + 1)
        assert torch.is_grad_enabled()  # for whoever takes the group


# The flow's steps: the loop of eq. 8, written out


@torch.no_grad()
def draw_by_hand(tokenizer, codes, noise, num_steps, solver):
    """After each step: its group, the picture so far, the jump estimate."""
    c = tokenizer.config
    z_prime = tokenizer.condition(codes)
    x = noise
    v_prev = None
    steps = []
    for i in range(num_steps):
        s, s_next = i / num_steps, (i + 1) / num_steps
        t = s / (s + c.time_shift * (1 - s))
        t_next = s_next / (s_next + c.time_shift * (1 - s_next))
        k = math.floor(s * 8 + 1e-9)
        if c.group_rule == "nearest":
            k = min(math.floor(s * 8 + 0.5 + 1e-9), 7)
        v = tokenizer.velocity(x, torch.full((len(x),), t), z_prime[:, 4 * k : 4 * k + 4])
        jump = (x + (1 - t) * v) / c.data_scale
        mean = v
        if solver == "ab2" and v_prev is not None:
            mean = 1.5 * v - 0.5 * v_prev
        x = x + (t_next - t) * mean
        v_prev = v
        steps.append((k, x / c.data_scale, jump))
    return steps


@pytest.mark.parametrize("rule", ["ceil", "nearest"])
@pytest.mark.parametrize("solver", ["euler", "ab2"])
@pytest.mark.parametrize("num_steps", [1, 5, 8, 12])
def test_pictures_are_the_loop_of_eq8(make_tokenizer, codes, noise, num_steps, solver, rule):
    tokenizer = make_tokenizer(group_rule=rule)
    by_hand = draw_by_hand(tokenizer, codes, noise, num_steps, solver)
    previews = torch.stack([jump for _, _, jump in by_hand])
    assert_close(tokenizer.decode(codes, noise, num_steps, solver), by_hand[-1][1])
    assert_close(tokenizer.previews(codes, noise, num_steps, solver), previews)
    groups = codes.split(4, 1)
    for k, step in enumerate(dar.denoise(tokenizer, groups, noise, num_steps, solver)):
        taken = [hand for hand in by_hand if hand[0] <= k]  # the steps that need no later group
        assert torch.equal(step.codes, codes[:, : 4 * (k + 1)])
        assert len(step.previews) == len(taken)
        assert_close(step.x, taken[-1][1])
        assert_close(step.preview, taken[-1][2])


def test_a_later_group_changes_no_earlier_preview(small_tokenizer, codes, noise):
    before = small_tokenizer.previews(codes, noise)
    for k in range(8):
        changed = codes.clone()
        changed[:, 4 * k] = (codes[:, 4 * k] + 1) % 64
        change = (small_tokenizer.previews(changed, noise) - before).abs().flatten(1).amax(1)
        assert change[:k].sum() < 1e-4
        assert change[k:].min() > 1e-3


@pytest.mark.parametrize("k", range(1, 8))
def test_k_groups_decode_to_the_preview_after_them(small_tokenizer, codes, noise, k):
    previews = small_tokenizer.previews(codes, noise)
    assert_close(small_tokenizer.decode(codes[:, : 4 * k], noise), previews[k - 1])


def test_with_euler_the_last_preview_is_the_picture(small_tokenizer, codes, noise):
    picture = small_tokenizer.decode(codes, noise, solver="euler")
    assert_close(small_tokenizer.previews(codes, noise, solver="euler")[-1], picture)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 48, 20)])
def test_noise_sets_the_size(small_tokenizer, codes, shape):
    assert small_tokenizer.decode(codes, torch.randn(shape)).shape == shape


# Streaming


def test_a_stream_equals_generate_then_decode(small_ar, small_tokenizer):
    settings = dict(cfg=(1.1, 4.0), temperature=0.9, top_k=40, top_p=0.95)
    *_, last = dar.stream(small_ar, small_tokenizer, LABELS, seeds=5, **settings)
    codes = small_ar.generate(LABELS, seeds=5, **settings)
    noise = dar.initial_noise([5, 6], 32, CPU)
    assert torch.equal(last.codes, codes)
    assert torch.equal(last.x, small_tokenizer.decode(codes, noise))
    assert torch.equal(torch.stack(last.previews), small_tokenizer.previews(codes, noise))


@pytest.mark.parametrize("given", [1, 4, 10, 32])
def test_a_stream_with_a_prefix(small_ar, small_tokenizer, codes, noise, given):
    prefix = codes[:, :given]
    *_, last = dar.stream(small_ar, small_tokenizer, LABELS, noise=noise, seeds=5, prefix=prefix)
    assert torch.equal(last.codes, small_ar.generate(LABELS, seeds=5, prefix=prefix))
    assert torch.equal(last.x, small_tokenizer.decode(last.codes, noise))


def test_each_group_takes_the_picture_a_step_on(small_ar, small_tokenizer, count_runs):
    """And a stream that is left early has cost no more than it has shown."""
    tokens = count_runs(small_ar.norm)
    steps = count_runs(small_tokenizer.diffusion)
    for k, step in enumerate(dar.stream(small_ar, small_tokenizer, LABELS, seeds=5)):
        assert len(tokens) == step.codes.shape[1] == 4 * (k + 1)
        assert len(steps) == len(step.previews) == k + 1
        if k == 2:
            break
    assert len(tokens) == 12
    assert len(steps) == 3


# Input that is refused, when the function is called and not at the first next()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"labels": torch.tensor([3, 11])}, "class labels.* 11.*0 ... 10"),
        ({"labels": torch.tensor([-1, 3])}, "class labels.*-1"),
        ({"labels": torch.tensor([1.0, 2.0])}, "class labels.*float32"),
        ({"labels": torch.tensor([[1, 2]])}, "class labels"),
        ({"labels": 3}, "class labels"),
        ({"labels": ["cat", "dog"]}, "class labels .*cat.*expected integers"),
        ({"labels": torch.tensor([True, False])}, "class labels.*bool"),
        ({"seeds": [1]}, "seeds"),
        ({"seeds": [1.5, 2.5]}, "seeds.*expected integers"),
        ({"seeds": "12"}, "seeds '12'"),
        ({"seeds": [2**70, 1]}, "seeds"),
        ({"top_k": 1.0}, "top_k = 1.0"),
        ({"top_p": "1"}, "top_p 1"),
        ({"temperature": None}, "temperature None"),
        ({"seeds": -1}, "seeds"),
        ({"seeds": 2**31 - 1}, "seeds"),  # the second would be 2^31
        ({"temperature": 0.0}, "temperature 0"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p 0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"prefix": torch.zeros(33, dtype=torch.int64)}, "prefix.*33.*at most 32"),
        ({"prefix": torch.zeros(3, 4, dtype=torch.int64)}, "prefix.*3, 4.*2 pictures"),
        ({"prefix": torch.zeros(4)}, "prefix.*float32"),
        ({"prefix": torch.tensor([0, 64])}, "prefix.*64"),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_what_cannot_be_drawn_is_refused(small_ar, small_tokenizer, call, settings, message):
    settings = {"labels": LABELS} | settings
    with pytest.raises(ValueError, match=message):
        if call == "generate":
            dar.generate_groups(small_ar, group_size=4, **settings)
        else:
            dar.stream(small_ar, small_tokenizer, **settings)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.IntTensor])
def test_numbers_come_as_any_list(small_ar, small_tokenizer, kind):
    labels, prefix, seeds = [3, 7], [1, 2, 3, 4], [5, 6]
    wanted = small_ar.generate(torch.tensor(labels), prefix=torch.tensor(prefix), seeds=seeds)
    codes = small_ar.generate(kind(labels), prefix=kind(prefix), seeds=kind(seeds))
    assert torch.equal(codes, wanted)
    *_, last = dar.stream(small_ar, small_tokenizer, kind(labels), prefix=prefix, seeds=seeds)
    assert torch.equal(last.codes, wanted)
    picture = small_tokenizer.decode(kind(codes.tolist()), noise=torch.zeros(2, 3, 32, 32))
    assert torch.equal(picture, small_tokenizer.decode(codes, noise=torch.zeros(2, 3, 32, 32)))


def test_a_model_that_drops_out_is_refused(make_ar):
    ar = make_ar(dropout=0.1).train()
    with pytest.raises(ValueError, match="training mode, with dropout 0.1: call eval"):
        ar.generate(LABELS)
    make_ar(dropout=0.0).train().generate(LABELS, num_tokens=2)


@pytest.mark.parametrize("num_tokens", [0, 33, 5.0])
def test_another_number_of_tokens_is_refused(small_ar, num_tokens):
    with pytest.raises(ValueError, match=f"num_tokens = {num_tokens}"):
        dar.generate_groups(small_ar, LABELS, 4, num_tokens)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"noise": torch.zeros(2, 3, 30, 32)}, "30, 32.*multiples of 4"),
        ({"noise": torch.zeros(1, 3, 32, 32)}, "noise for 1 pictures"),
        ({"solver": "heun"}, "'heun'"),
        ({"num_steps": -1}, "-1 sampling steps"),
        ({"num_steps": 4.0}, "4.0 sampling steps"),
    ],
    ids=str,
)
def test_a_flow_that_cannot_be_taken_is_refused(small_ar, small_tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        dar.stream(small_ar, small_tokenizer, LABELS, **settings)


def test_a_tokenizer_of_another_model_is_refused(small_ar, make_tokenizer):
    with pytest.raises(ValueError, match="64 .* 50"):
        dar.stream(small_ar, make_tokenizer(codebook_size=50), LABELS)


def test_what_is_no_model_is_refused(small_ar, small_tokenizer):
    with pytest.raises(ValueError, match="ARTransformer and str: expected a Llama and a tokenizer"):
        dar.stream(small_ar, "tokenizer.pt", LABELS)
    with pytest.raises(ValueError, match="expected a Llama and a tokenizer"):
        dar.stream(small_tokenizer, small_ar, LABELS)
