"""Guidance and sampling, streaming, and the losses, each by itself: all that another exercise of the course writes is
replaced by a stand-in. So these tests grade one exercise alone (experiments/exercises.py)."""

import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import nn

import dar

assert_close = torch.testing.assert_close
K, SIZE = 4, 2  # groups, and tokens in a group


# Exercise 1 by plain numbers, for the tests of exercises 6 and 8


def time_of(s, beta):
    return s / (beta + (1 - beta) * s)


def steps_of(num_steps: int, num_groups: int, beta: float, rule: str) -> list[tuple[float, float, int]]:
    starts = [i / num_steps for i in range(num_steps + 1)]
    groups = [min(i * num_groups // num_steps, num_groups - 1) for i in range(num_steps)]
    return [(time_of(a, beta), time_of(b, beta), k) for a, b, k in zip(starts, starts[1:], groups)]


def column(t):
    return t.reshape(-1, 1, 1, 1) if isinstance(t, torch.Tensor) else t


@pytest.fixture
def flow(monkeypatch):
    """Chapter 1 as the tests above write it."""

    def condition_group(s, count, rule="ceil"):
        return (s * count).floor().long().clamp(0, count - 1)

    def interpolate(x0, x1, t):
        return column(t) * x1 + (1 - column(t)) * x0

    def jump_estimate(x_t, velocity, t):
        return x_t + (1 - column(t)) * velocity

    def solver_step(x, v, v_prev, h, solver):
        return x + h * (v if solver == "euler" or v_prev is None else (3 * v - v_prev) / 2)

    monkeypatch.setattr(dar, "shift_time", time_of)
    monkeypatch.setattr(dar, "sampling_schedule", steps_of)
    for function in (condition_group, interpolate, jump_estimate, solver_step):
        monkeypatch.setattr(dar, function.__name__, function)


# Exercise 4: a Llama whose logits follow from the class and all tokens so far


class StandInLlama:
    """Its cache holds what was read, class and tokens, as numbers; all of these choose a table's row as the logits."""

    config = types.SimpleNamespace(num_tokens=12, num_classes=5, vocab_size=8)

    def __init__(self):
        self.table = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
        self.reads = []  # (batch, numbers read, places, length)

    def new_caches(self, batch, length):
        return [torch.full((batch, length), -1)]

    def embed(self, codes, labels=None):
        return codes if labels is None else torch.cat((100 + labels[:, None], codes), 1)

    def next_logits(self, x, place, length, caches):
        assert place[-1] < length <= caches[0].shape[1] and x.shape == (len(caches[0]), len(place))
        caches[0][:, place] = x
        self.reads.append((*x.shape, place.tolist(), length))
        read = caches[0][:, : int(place[-1]) + 1]
        assert (read >= 0).all(), "a place was skipped"
        return self.logits(read)

    def logits(self, read):
        """Of what comes after the numbers read, int64 [B, n]."""
        weight = torch.arange(1, read.shape[1] + 1) ** 2
        return self.table[(read * weight).sum(1) % 64]

    def expected(self, label, cfg, count=12, prefix=()):
        """The likeliest tokens, every one from all that came before."""
        codes = list(prefix)
        for i in range(len(codes), count):
            with_class, without = (self.logits(torch.tensor([[100 + c, *codes]]))[0] for c in (label, 5))
            start, end = cfg if isinstance(cfg, tuple) else (cfg, cfg)
            scale = start + (end - start) * i / (count - 1)
            codes.append(int((without + scale * (with_class - without)).argmax()))
        return codes


@pytest.fixture
def llama():
    return StandInLlama()


LABELS = torch.tensor([0, 3, 1])


def drawn(llama, labels=LABELS, group_size=4, **settings):
    return torch.cat(list(dar.generate_groups(llama, labels, group_size, **{"greedy": True} | settings)), 1)


@pytest.mark.parametrize("cfg", [None, 1.0, 3.0, (1.0, 6.0), (4.0, 0.5)], ids=str)
def test_greedy_tokens_are_the_likeliest_of_the_guided_logits(llama, cfg):
    codes = drawn(llama, cfg=cfg)
    assert codes.dtype == torch.int64
    assert codes.tolist() == [llama.expected(label, 1.0 if cfg is None else cfg) for label in LABELS.tolist()]


@pytest.mark.parametrize("cfg, rows", [(None, 3), (1, 3), (2.0, 6), ((1.0, 4.0), 6)], ids=str)
def test_each_token_is_read_once_and_class_and_prefix_at_once(llama, cfg, rows):
    prefix = torch.tensor([7, 0, 2, 5, 1])
    drawn(llama, cfg=cfg, prefix=prefix)
    assert [read[:3] for read in llama.reads] == [
        (rows, 6, [0, 1, 2, 3, 4, 5]),
        *((rows, 1, [i]) for i in range(6, 12)),  # the last token is not read
    ]


def test_groups_come_as_soon_as_they_are_full(llama):
    sizes, reads = [], []
    for group in dar.generate_groups(llama, LABELS, 5, greedy=True):
        sizes.append(group.shape[1])
        reads.append(len(llama.reads))
    assert sizes == [5, 5, 2] and reads == [5, 10, 12]
    assert drawn(llama, num_tokens=7).shape == (3, 7)


@pytest.mark.parametrize("cfg", [None, (1.0, 6.0)], ids=str)
def test_a_prefix_is_kept_and_what_follows_depends_on_it(llama, cfg):
    prefix = torch.tensor([[1, 2, 3], [7, 7, 7], [0, 5, 0]])
    codes = drawn(llama, cfg=cfg, prefix=prefix)
    expected = [llama.expected(c, cfg or 1.0, prefix=p) for c, p in zip(LABELS.tolist(), prefix.tolist())]
    assert codes.tolist() == expected
    assert torch.equal(drawn(llama, prefix=codes), codes)  # all are given
    groups = list(dar.generate_groups(llama, LABELS, 4, greedy=True, prefix=codes))
    assert [group.shape[1] for group in groups] == [4, 4, 4]


def test_noise_belongs_to_its_token_also_after_a_prefix(llama):
    codes = drawn(llama, greedy=False, seeds=[4, 9, 2], temperature=3.0)
    again = drawn(llama, greedy=False, seeds=[4, 9, 2], temperature=3.0, prefix=codes[:, :5])
    assert torch.equal(codes, again)
    alone = drawn(llama, LABELS[1:2], greedy=False, seeds=[9], temperature=3.0)
    assert torch.equal(alone, codes[1:2])
    others = drawn(llama, greedy=False, seeds=[5, 8, 3], temperature=3.0)
    assert not torch.equal(others, codes)


@pytest.mark.parametrize("setting", [dict(), dict(temperature=0.5), dict(top_k=3), dict(top_p=0.9)], ids=str)
def test_tokens_are_drawn_from_softmax_of_the_guided_and_filtered_logits(llama, setting):
    labels, cfg = torch.full((4000,), 2), 1.5
    codes = drawn(llama, labels, num_tokens=1, cfg=cfg, seeds=0, greedy=False, **setting)
    with_class, without = (llama.logits(torch.tensor([[100 + c]]))[0] for c in (2, 5))
    logits = (without + cfg * (with_class - without)) / setting.get("temperature", 1)
    order = logits.argsort(descending=True)
    p, stays = logits.double().softmax(-1)[order], torch.ones(8, dtype=torch.bool)
    stays &= torch.arange(8) < setting.get("top_k", 8)
    stays &= p.cumsum(0) - p < setting.get("top_p", 1)
    expected = 4000 * (p * stays / (p * stays).sum()).numpy()
    counts = np.bincount(codes[:, 0], minlength=8)[order.numpy()]
    assert counts[expected == 0].sum() == 0
    assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 0.001


# Exercise 6: a tokenizer whose velocity is a formula, and groups of tokens that are given


def formula(x_t, t, group_z):
    return 0.3 * x_t + column(t) + group_z.float().mean((1, 2)).reshape(-1, 1, 1, 1)


@pytest.fixture
def tokenizer(make_tokenizer):
    """K = 4 groups of 2 tokens; `calls` are those of its velocity."""
    tokenizer = make_tokenizer(num_tokens=K * SIZE, num_groups=K, image_size=8, time_shift=3.0, data_scale=0.5)
    tokenizer.calls = []

    def velocity(x_t, t, group_z):
        tokenizer.calls.append(t)
        return formula(x_t, t, group_z)

    tokenizer.velocity = velocity
    return tokenizer


def some_groups(tokenizer, batch=3):
    codes = torch.randint(64, (batch, K * SIZE), generator=torch.Generator().manual_seed(1))
    return codes, codes.split(SIZE, 1)


@pytest.mark.parametrize("solver", ["euler", "ab2"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 6, 12])
@torch.no_grad()
def test_denoising_is_the_sampling_loop_of_eq8(flow, tokenizer, num_steps, solver):
    codes, groups = some_groups(tokenizer)
    noise = torch.randn(3, 3, 8, 16)
    z = tokenizer.condition(codes)
    x, before, newest, estimates = noise, None, {}, []
    for t, t_next, k in steps_of(num_steps, K, 3.0, "ceil"):
        v = formula(x, torch.full((1,), t), z[:, SIZE * k : SIZE * k + SIZE])
        estimates.append((x + (1 - t) * v) / 0.5)
        x = x + (t_next - t) * (v if before is None or solver == "euler" else 1.5 * v - 0.5 * before)
        before, newest[k] = v, (x / 0.5, len(estimates))
    steps = list(tokenizer.denoise(groups, noise, num_steps, solver))
    assert len(steps) == K and len(tokenizer.calls) == num_steps  # a preview costs no call
    assert all(t.shape == (1,) and t.dtype == torch.float32 for t in tokenizer.calls)
    for k, step in enumerate(steps):
        expected, count = newest[max(i for i in newest if i <= k)]
        assert torch.equal(step.codes, codes[:, : SIZE * (k + 1)])
        assert_close(step.x, expected, rtol=1e-4, atol=1e-4)
        assert len(step.previews) == count
        for preview, estimate in zip(step.previews, estimates):
            assert_close(preview, estimate, rtol=1e-4, atol=1e-4)


def test_a_step_is_taken_as_soon_as_its_group_is_there(flow, tokenizer):
    given, (_, groups) = [], some_groups(tokenizer)

    def one_by_one():
        for group in groups:
            given.append(group)
            yield group

    steps = tokenizer.denoise(one_by_one(), torch.randn(3, 3, 8, 8), 8)
    for k in range(1, K + 1):
        next(steps)
        assert len(given) == k and len(tokenizer.calls) == 2 * k
    assert next(steps, None) is None
    few = list(tokenizer.denoise(groups[:2], torch.randn(3, 3, 8, 8)))  # K steps if nobody says how many
    assert len(few) == 2 and len(tokenizer.calls) == 8 + 2


def test_ab2_is_the_default_and_the_config_sets_the_number_of_steps(flow, make_tokenizer):
    tokenizer = make_tokenizer(num_tokens=K * SIZE, num_groups=K, image_size=8, num_steps=6)
    tokenizer.velocity = formula
    noise, groups = torch.randn(3, 3, 8, 8), some_groups(tokenizer)[1]
    *_, default = tokenizer.denoise(groups, noise)
    *_, ab2 = tokenizer.denoise(groups, noise, 6, "ab2")
    assert len(default.previews) == 6 and torch.equal(default.x, ab2.x)


def test_noise_that_does_not_fit_is_refused_by_the_sampler(flow, tokenizer):
    for shape in ((2, 3, 8, 8), (3, 3, 8, 9), (3, 1, 8, 8)):
        with pytest.raises(ValueError, match="noise"):
            list(tokenizer.denoise(some_groups(tokenizer)[1], torch.randn(shape)))


@pytest.fixture
def writer(monkeypatch):
    """generate_groups as a stand-in that notes its arguments and gives groups of zeros, one for each next()."""
    calls = []

    def generate(ar, labels, group_size, num_tokens=None, cfg=(1.1, 8.0), seeds=None, *rest, **more):
        calls.append((group_size, num_tokens, dict(cfg=cfg, seeds=seeds) | more))
        for _ in range(ar.config.num_tokens // group_size):
            calls.append("a group")
            yield torch.zeros(len(labels), group_size, dtype=torch.int64)

    monkeypatch.setattr(dar, "generate_groups", generate)
    return calls


def ar_of(tokenizer):
    c = tokenizer.config
    return types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=c.codebook_size, num_tokens=c.num_tokens))


def test_stream_draws_each_group_and_shows_it_at_once(flow, writer, tokenizer):
    stream = dar.stream(ar_of(tokenizer), tokenizer, LABELS, cfg=(1.0, 3.0), seeds=[4, 5, 6], top_k=7, num_steps=8)
    for k in range(1, K + 1):
        step = next(stream)
        assert writer.count("a group") == k and len(tokenizer.calls) == 2 * k
    (size, count, settings), *_ = writer
    assert size == SIZE and count in (None, K * SIZE)
    assert settings.pop("cfg") == (1.0, 3.0) and list(settings.pop("seeds")) == [4, 5, 6] and settings["top_k"] == 7
    noise = dar.initial_noise([4, 5, 6], 8, LABELS.device)
    *_, expected = tokenizer.denoise(some_groups(tokenizer)[1][0].mul(0).repeat(1, K).split(SIZE, 1), noise, 8)
    assert torch.equal(step.x, expected.x)


def test_without_seeds_noise_and_tokens_have_the_same_random_ones(flow, writer, tokenizer):
    noises, real = [], dar.initial_noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dar, "initial_noise", lambda seeds, *args: noises.append(list(seeds)) or real(seeds, *args))
        list(dar.stream(ar_of(tokenizer), tokenizer, LABELS))
    assert list(writer[0][2]["seeds"]) == noises[0] and len(noises[0]) == 3


def test_stream_takes_noise_and_solver_and_refuses_another_models_tokenizer(flow, writer, tokenizer):
    noise = torch.randn(3, 3, 16, 8)
    *_, last = dar.stream(ar_of(tokenizer), tokenizer, LABELS, noise=noise, solver="euler")
    *_, expected = tokenizer.denoise(torch.zeros(3, K * SIZE, dtype=torch.int64).split(SIZE, 1), noise, None, "euler")
    assert torch.equal(last.x, expected.x)
    ar = ar_of(tokenizer)
    ar.config.vocab_size = 65
    with pytest.raises(ValueError, match="65"):
        list(dar.stream(ar, tokenizer, LABELS))


# Exercise 8: a quantizer and a diffusion decoder that note what they are given


class StandInQuantizer(nn.Module):
    """Features unchanged, as codes that count through, with losses that are numbers with a gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.keeps = []

    def forward(self, f, keep=None):
        self.keeps.append(keep)
        codes = torch.arange(f.shape[0] * f.shape[1]).view(f.shape[:2])
        return F.normalize(f.float(), dim=-1), codes, self.weight**2, 3 * self.weight


class StandInDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x_t, t, group_z, repa=False):
        self.calls.append((x_t, t, group_z, repa))
        return formula(x_t, t, group_z), group_z[:, :1] if repa else None


@pytest.fixture
def make_learner(make_tokenizer):
    def make(**fields):
        fields = dict(num_tokens=K * SIZE, num_groups=K, image_size=8, time_shift=3.0, data_scale=0.5) | fields
        learner = make_tokenizer(**fields)
        learner.quantize, learner.diffusion = StandInQuantizer(), StandInDecoder()
        return learner

    return make


IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
S = torch.tensor([0.1, 0.6, 0.9])  # groups 0, 2 and 3


def test_the_training_step_of_one_time(flow, make_learner):
    learner, noise = make_learner(commit_weight=0.1), torch.randn(3, 3, 8, 8)
    out = learner(IMAGES, S, noise)
    ((x_t, t, group_z, repa),) = learner.diffusion.calls
    times = time_of(S, 3.0)
    assert_close(t, times)
    assert not repa and "repa" not in out
    t = column(times)
    assert_close(x_t, t * 0.5 * IMAGES + (1 - t) * noise)
    z = learner.causal_decoder(F.normalize(learner.encoder(IMAGES), dim=-1)).unflatten(1, (K, SIZE))
    assert_close(group_z, torch.stack([z[0, 0], z[1, 2], z[2, 3]]))
    v = formula(x_t, times, group_z)
    assert_close(out["fm"], (v - (0.5 * IMAGES - noise)).pow(2).mean() / 0.25)
    assert_close(out["pred_image"], (x_t + (1 - t) * v) / 0.5)
    assert_close(out["vq"], torch.tensor(4.0))
    assert_close(out["commit"], torch.tensor(0.6))
    assert torch.equal(out["codes"], torch.arange(3 * K * SIZE).view(3, -1))


def test_the_quantizers_losses_leave_out_tokens_after_the_group_in_use(flow, make_learner):
    learner = make_learner()
    out = learner(IMAGES, S)
    (keep,) = learner.quantize.keeps
    assert keep.dtype == torch.bool and keep.sum(1).tolist() == [2, 6, 8] and keep[:, :2].all()
    assert int(out["kept"]) == 16
    learner(IMAGES, torch.stack((S, S.flip(0)), 1))
    assert learner.quantize.keeps[1].sum(1).tolist() == [8, 6, 8]  # the later one of two times


def test_several_times_share_one_encoding(flow, make_learner):
    learner, noise = make_learner(), torch.randn(3, 2, 3, 8, 8)
    s = torch.tensor([[0.1, 0.9], [0.6, 0.2], [0.4, 0.99]])
    out = learner(IMAGES, s, noise)
    x_t, t, group_z, _ = learner.diffusion.calls[0]
    assert x_t.shape == (6, 3, 8, 8) and group_z.shape[:2] == (6, SIZE) and len(learner.quantize.keeps) == 1
    assert_close(t, time_of(s, 3.0).flatten())
    for r in range(2):
        single = learner(IMAGES, s[:, r], noise[:, r])
        assert_close(out["pred_image"].unflatten(0, (3, 2))[:, r], single["pred_image"])
    assert out["fm"].ndim == 0


def test_before_there_is_a_codebook_noise_stands_for_the_quantizers_error(flow, make_learner):
    learner, code_noise = make_learner(), 0.3 * torch.randn(3, K * SIZE, 8)
    out = learner(IMAGES, S, code_noise=code_noise)
    _, _, group_z, _ = learner.diffusion.calls[0]
    f = F.normalize(learner.encoder(IMAGES), dim=-1)
    z = learner.causal_decoder(F.normalize(f + code_noise, dim=-1)).unflatten(1, (K, SIZE))
    assert_close(group_z, torch.stack([z[0, 0], z[1, 2], z[2, 3]]))
    assert out["vq"].item() == out["commit"].item() == 0
    (out["vq"] + out["commit"]).backward()
    assert learner.quantize.weight.grad == 0  # and not None


@torch.no_grad()
def test_times_are_uniform_and_noise_is_normal_if_none_are_given(flow, make_learner):
    learner = make_learner()
    learner(torch.zeros(1000, 3, 8, 8))
    x_t, t, _, _ = learner.diffusion.calls[0]
    s = 3 * t / (1 + 2 * t)
    assert (s.sort().values - torch.linspace(0, 1, 1000)).abs().max() < 0.06
    noise = x_t / (1 - column(t))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_what_the_repa_head_says_is_handed_on(flow, make_learner):
    learner = make_learner(repa_layer=1)
    out = learner(IMAGES, S)
    assert learner.diffusion.calls[0][3] and torch.equal(out["repa"], learner.diffusion.calls[0][2][:, :1])


def test_the_loss_is_the_sum_of_eq7s_terms():
    out = {name: torch.tensor(value) for name, value in dict(fm=1.5, vq=0.25, commit=0.125).items()}
    out |= {"pred_image": torch.randn(6, 3, 4, 4), "repa": torch.randn(6, 5, 7)}
    images, target = torch.randn(3, 3, 4, 4), torch.randn(3, 5, 7)
    assert dar.tokenizer_loss(out, images) == {name: out[name] for name in ("fm", "vq", "commit")}
    terms = dar.tokenizer_loss(out, images, lambda a, b: (a - b).abs().mean((1, 2, 3)), 0.3, target, 0.7)
    assert list(terms) == ["fm", "vq", "commit", "lpips", "repa"]
    distance = sum((out["pred_image"][i] - images[i // 2]).abs().mean() for i in range(6)) / 6
    assert_close(terms["lpips"], 0.3 * distance)
    cosine = [F.cosine_similarity(out["repa"][i], target[i // 2], dim=-1).mean() for i in range(6)]
    assert_close(terms["repa"], 0.7 * (1 - sum(cosine) / 6))
    terms = dar.tokenizer_loss(out, images, lambda a, b: torch.ones(6), repa_target=target)
    assert_close(terms["lpips"], torch.tensor(0.5))
    assert_close(terms["repa"], 0.5 * (1 - sum(cosine) / 6))
    assert math.isfinite(sum(terms.values()))


# Exercise 7: a cache that notes what is put into it


def test_keys_and_values_go_through_the_cache():
    attention, puts = dar.LlamaAttention(128), []
    x, place, mask = torch.randn(2, 3, 128), torch.tensor([4, 5, 6]), torch.rand(3, 9) < 0.7
    mask[:, 0] = True
    rope = torch.stack((torch.rand(3, 32), torch.rand(3, 32)), -1)
    kept = torch.randn(2, 2, 2, 9, 64)
    cache = types.SimpleNamespace(put=lambda k, v, place, length: puts.append((k, v, place, length)) or kept)
    out = attention(x, rope, mask, cache, place)
    ((k, v, places, length),) = puts
    assert places is place and length == 9
    q, keys, values = (x @ attention.wqkv.weight.T).unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
    assert_close(v, values)
    assert_close(k, dar.rotate(keys, rope))
    scores = dar.rotate(q, rope) @ kept[0].transpose(-1, -2) / 8
    read = scores.masked_fill(~mask, -math.inf).softmax(-1) @ kept[1]
    assert_close(out, read.transpose(1, 2).flatten(2) @ attention.wo.weight.T)
