"""Chapter 7: drawing tokens (section 5, Table 4)."""

import math

import numpy as np
import pytest
import synthetic
import torch
from scipy.stats import chisquare

import dar

CPU = torch.device("cpu")
LABELS = torch.tensor([3, 7])


@pytest.fixture(scope="module")
def golden_model(golden_ar) -> dar.ARTransformer:
    args, weights = golden_ar["args"], synthetic.synthetic_state_dict(golden_ar)
    config = dar.ARConfig(args["dim"], args["n_layer"], args["vocab_size"], args["num_classes"], args["block_size"])
    weights["cls_embedding.weight"] = weights.pop("cls_embedding.embedding_table.weight")
    model = dar.ARTransformer(config).eval()
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def dice() -> dar.ARTransformer:
    """Fresh and so without opinion: all logits are 0, and a picture's tokens are its random numbers laid bare."""
    return dar.ARTransformer(dar.ARConfig(64, 1, vocab_size=64, num_classes=10, num_tokens=80)).eval()


@pytest.fixture(scope="module")
def bigram(make_ar) -> dar.ARTransformer:
    """Without layers a token depends on the one before alone, so that every distribution can be written down."""
    return make_ar(layers=0, vocab_size=8, num_tokens=4)


class Record:
    """Batch size and length of each run of the network."""

    def __init__(self, ar):
        self.batches, self.lengths = [], []
        self.hook = ar.norm.register_forward_pre_hook(self.note)

    def note(self, module, args):
        self.batches.append(args[0].shape[0])
        self.lengths.append(args[0].shape[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


# Guidance


def test_guidance_schedule_agrees_with_the_authors(golden_ar):
    start, end = (float(x) for x in str(golden_ar["cfg_scale"]).split(","))
    np.testing.assert_allclose(dar.guidance_schedule((start, end), 32), golden_ar["cfg_schedule"], rtol=1e-6)


def test_guidance_schedule_is_linear_with_both_ends_or_constant():
    assert dar.guidance_schedule((1.0, 8.0), 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert dar.guidance_schedule([9.0, 1.0], 3) == [9, 5, 1]
    assert dar.guidance_schedule(1.5, 4) == [1.5] * 4
    assert dar.guidance_schedule((1.1, 8.0), 1) == [1.1]
    assert dar.guidance_schedule((1, 2), 2) == [1, 2]


@pytest.mark.parametrize("cfg", [None, 1, 1.0, (1.0, 1.0)])
def test_without_guidance_there_is_no_unconditional_half(small_ar, cfg):
    assert dar.guidance_schedule(cfg, 8) is None
    with Record(small_ar) as record:
        small_ar.generate(LABELS, cfg=cfg, seeds=0)
    assert record.batches == [2] * 32


def test_with_guidance_both_halves_run_in_one_batch(small_ar):
    with Record(small_ar) as record:
        small_ar.generate(LABELS, cfg=(1.0, 4.0), seeds=0)
    assert record.batches == [4] * 32


@pytest.mark.parametrize("cfg", ["4", (1.0, 2.0, 3.0), (1.0,), math.nan, (1.0, math.inf), True, (None, 4.0)])
def test_guidance_of_another_form_is_refused(small_ar, cfg):
    with pytest.raises(ValueError, match="guidance"):
        small_ar.generate(LABELS, cfg=cfg)


# Tokens


def test_greedy_tokens_agree_with_the_authors(golden_model, golden_ar):
    cfg = tuple(float(x) for x in str(golden_ar["cfg_scale"]).split(","))
    codes = golden_model.generate(torch.from_numpy(golden_ar["labels"]), cfg=cfg, greedy=True)
    assert torch.equal(codes, torch.from_numpy(golden_ar["greedy"]).long())


@pytest.mark.parametrize("given", [1, 10, 31])
def test_a_prefix_does_not_shift_the_guidance(golden_model, golden_ar, given):
    cfg = tuple(float(x) for x in str(golden_ar["cfg_scale"]).split(","))
    golden = torch.from_numpy(golden_ar["greedy"]).long()
    codes = golden_model.generate(torch.from_numpy(golden_ar["labels"]), cfg=cfg, greedy=True, prefix=golden[:, :given])
    assert torch.equal(codes, golden)


@pytest.mark.parametrize("cfg", [None, 0.0, 2.5, (1.1, 8.0)])
@pytest.mark.parametrize("count", [32, 8])
@torch.no_grad()
def test_greedy_equals_generation_without_a_cache(small_ar, cfg, count):
    start, end = cfg if isinstance(cfg, tuple) else (1.0 if cfg is None else cfg,) * 2
    labels = torch.arange(10)
    codes = torch.empty(10, 0, dtype=torch.int64)
    for i in range(count):
        scale = start + (end - start) * i / (count - 1)
        conditional = small_ar(codes, labels)[:, -1]
        unconditional = small_ar(codes, torch.full_like(labels, 10))[:, -1]
        token = (unconditional + scale * (conditional - unconditional)).argmax(-1)
        codes = torch.cat((codes, token[:, None]), 1)
    assert torch.equal(small_ar.generate(labels, count, cfg, greedy=True), codes)


def test_guiding_the_unconditional_class_changes_nothing(small_ar):
    labels = torch.tensor([10, 10])
    assert torch.equal(small_ar.generate(labels, cfg=4.0, seeds=0), small_ar.generate(labels, cfg=None, seeds=0))


def test_each_token_runs_the_network_once_and_a_prefix_in_one_pass(small_ar):
    with Record(small_ar) as record:
        small_ar.generate(LABELS, seeds=0)
    assert record.lengths == [1] * 32
    with Record(small_ar) as record:
        small_ar.generate(LABELS, seeds=0, prefix=torch.arange(12))
    assert record.lengths == [13] + [1] * 19


def test_greedy_ignores_what_sampling_is_set_to(small_ar):
    settings = dict(temperature=1e-45, top_k=3, top_p=0.5)
    assert torch.equal(small_ar.generate(LABELS, greedy=True, **settings), small_ar.generate(LABELS, greedy=True))


def test_greedy_ignores_seeds(small_ar):
    first = small_ar.generate(LABELS, greedy=True, seeds=0)
    assert torch.equal(small_ar.generate(LABELS, greedy=True, seeds=1), first)
    assert torch.equal(small_ar.generate(LABELS, greedy=True), first)


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_sampling_becomes_greedy_at_the_end_of_each_scale(small_ar, setting):
    greedy = small_ar.generate(LABELS, cfg=(1.1, 8.0), greedy=True)
    assert torch.equal(small_ar.generate(LABELS, cfg=(1.1, 8.0), seeds=5, **setting), greedy)


def test_bfloat16_generates(make_ar):
    codes = make_ar().to(torch.bfloat16).generate(LABELS, seeds=0)
    assert codes.shape == (2, 32) and 0 <= codes.min() <= codes.max() < 64


@pytest.mark.parametrize("group_size", [1, 4, 5, 32])
def test_groups_joined_are_what_generate_returns(small_ar, group_size):
    groups = list(dar.generate_groups(small_ar, LABELS, group_size, seeds=4, prefix=torch.arange(6)))
    size = group_size
    assert [len(g[0]) for g in groups] == [min(size, 32 - start) for start in range(0, 32, size)]
    assert torch.equal(torch.cat(groups, 1), small_ar.generate(LABELS, seeds=4, prefix=torch.arange(6)))


def test_a_group_is_yielded_as_soon_as_it_is_drawn(small_ar):
    with Record(small_ar) as record:
        groups = dar.generate_groups(small_ar, LABELS, group_size=4, seeds=0)
        for k in range(1, 9):
            next(groups)
            assert len(record.lengths) == 4 * k


# Distribution


def reference(logits, temperature, top_k, top_p) -> np.ndarray:
    """What filter_logits should leave of logits [V], as probabilities, in plain float64."""
    p = np.exp(np.float64(logits) / temperature)
    order = np.argsort(-p)
    order = order[: top_k or None]
    p = p[order] / p[order].sum()
    count = 1 + int((p.cumsum() < top_p).sum())  # the first that reach the mass
    out = np.zeros(len(logits))
    out[order[:count]] = p[:count] / p[:count].sum()
    return out


SETTINGS = [
    dict(temperature=1.0, top_k=0, top_p=1.0),
    dict(temperature=0.5, top_k=0, top_p=1.0),
    dict(temperature=3.0, top_k=0, top_p=1.0),
    dict(temperature=1.0, top_k=3, top_p=1.0),
    dict(temperature=1.0, top_k=8, top_p=1.0),
    dict(temperature=1.0, top_k=99, top_p=1.0),
    dict(temperature=1.0, top_k=0, top_p=0.1),
    dict(temperature=1.0, top_k=0, top_p=0.7),
    dict(temperature=1.0, top_k=0, top_p=0.999),
    dict(temperature=3.0, top_k=3, top_p=0.5),
    dict(temperature=0.4, top_k=5, top_p=0.8),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_filtered_logits_are_the_right_distribution(setting):
    logits = 2 * torch.randn(200, 8)
    out = dar.filter_logits(logits, **setting).softmax(-1)
    np.testing.assert_allclose(out, [reference(row, **setting) for row in logits.numpy()], rtol=1e-5, atol=1e-7)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logits = torch.tensor([[0.5, 0.2, 0.18, 0.12]]).log()
    for top_p, kept in ((0.01, 1), (0.49, 1), (0.51, 2), (0.69, 2), (0.71, 3), (0.87, 3), (0.89, 4), (0.9999, 4)):
        assert dar.filter_logits(logits, 1.0, 0, top_p).isfinite().sum() == kept, top_p


def test_temperature_comes_before_top_k_and_top_k_before_top_p():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    assert dar.filter_logits(logits, 1.0, 0, 0.55).isfinite().sum() == 1
    assert dar.filter_logits(logits, 2.0, 0, 0.55).isfinite().sum() == 2  # at T = 2 the first has 0.47
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert dar.filter_logits(logits, 1.0, 0, 0.5).isfinite().sum() == 2
    assert dar.filter_logits(logits, 1.0, 2, 0.5).isfinite().sum() == 1  # of the two that are left the first has 0.57


@pytest.mark.parametrize("cfg", [None, 3.0])
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[9], SETTINGS[10]])
@torch.no_grad()
def test_tokens_are_drawn_from_the_guided_filtered_softmax(bigram, setting, cfg):
    count = 4000
    conditional, unconditional = (
        bigram(torch.empty(1, 0, dtype=torch.int64), torch.tensor([c]))[0, 0] for c in (2, 10)
    )
    guided = unconditional + (1 if cfg is None else cfg) * (conditional - unconditional)
    expected = count * reference(guided.numpy(), **setting)
    codes = bigram.generate(torch.full((count,), 2), num_tokens=1, cfg=cfg, seeds=0, **setting)
    counts = np.bincount(codes[:, 0], minlength=8)
    assert counts[expected == 0].sum() == 0
    if (expected > 0).sum() > 1:
        assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 0.001


@torch.no_grad()
def test_random_numbers_of_tokens_and_of_neighbouring_seeds_are_independent(bigram):
    count = 6000
    codes = bigram.generate(torch.full((count,), 2), num_tokens=3, cfg=None, seeds=0).numpy()
    logits = bigram(torch.arange(8)[:, None], torch.full((8,), 2))  # [8, 2, V]: after the class, after each token
    first = logits[0, 0].double().softmax(-1).numpy()
    then = logits[:, 1].double().softmax(-1).numpy()
    for i in range(2):  # p(a, b) = p(a) p(b | a)
        now = first if i == 0 else first @ then
        pairs = np.bincount(codes[:, i] * 8 + codes[:, i + 1], minlength=64)
        assert chisquare(pairs, count * (now[:, None] * then).ravel()).pvalue > 0.001
    pairs = np.bincount(codes[::2, 0] * 8 + codes[1::2, 0], minlength=64)
    assert chisquare(pairs, count / 2 * np.outer(first, first).ravel()).pvalue > 0.001


# Seeds


def test_random_numbers_follow_from_the_seed_alone(dice):
    seeds = [11, 4, 2**31 - 1]
    together = dice.generate(torch.tensor([0, 1, 2]), cfg=None, seeds=seeds)
    assert len({tuple(row) for row in together.tolist()}) == 3
    for row, seed in zip(together, seeds):
        assert torch.equal(dice.generate(torch.tensor([9]), cfg=None, seeds=[seed])[0], row)
        assert torch.equal(dice.generate(torch.tensor([5]), cfg=4.0, seeds=[seed], num_tokens=50)[0], row[:50])
    backwards = dice.generate(torch.tensor([0, 1, 2]), cfg=2.0, seeds=seeds[::-1])
    assert torch.equal(backwards.flip(0), together)


def test_random_numbers_do_not_repeat_within_a_picture(dice):
    codes = dice.generate(torch.tensor([0]), cfg=None, seeds=0)[0]
    assert not torch.equal(codes[:32], codes[32:64])
    assert len(codes.unique()) > 30  # of 64, in 80 draws


@pytest.mark.parametrize("given", [1, 31, 32, 33, 79])
def test_a_prefix_does_not_shift_the_random_numbers(dice, given):
    free = dice.generate(LABELS, cfg=None, seeds=8)
    prefix = (free[:, :given] + 1) % 64
    codes = dice.generate(LABELS, cfg=None, seeds=8, prefix=prefix)
    assert torch.equal(codes[:, :given], prefix)
    assert torch.equal(codes[:, given:], free[:, given:])


def test_the_tokens_of_32_pictures_are_the_same_at_batch_1_3_and_8(small_ar):
    labels = torch.arange(32) % 11
    drawn = {}
    for batch in (1, 3, 8):
        parts = [small_ar.generate(labels[i : i + batch], seeds=100 + i) for i in range(0, 32, batch)]
        drawn[batch] = torch.cat(parts)
    assert torch.equal(drawn[1], drawn[3])
    assert torch.equal(drawn[1], drawn[8])
    assert len({tuple(row) for row in drawn[1].tolist()}) == 32


def test_an_int_seed_counts_on_and_none_draws_fresh_ones(dice):
    counted = dice.generate(LABELS, seeds=6)
    assert torch.equal(counted, dice.generate(LABELS, seeds=[6, 7]))
    fresh = dice.generate(LABELS)
    assert not torch.equal(fresh[0], fresh[1])
    assert not torch.equal(fresh, dice.generate(LABELS))


def test_with_seeds_the_global_random_state_is_left_alone(small_ar):
    before = torch.get_rng_state()
    small_ar.generate(LABELS, seeds=0)
    dar.initial_noise([0, 1], 8, CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3], -1, [0, -5], 2**31, 2**31 - 1, [0, 2**31]])
def test_seeds_that_do_not_fit_are_refused(small_ar, seeds):  # 2**31 - 1 would count on to 2**31
    with pytest.raises(ValueError, match="seed"):
        small_ar.generate(LABELS, seeds=seeds)


def test_a_picture_owns_its_noise():
    together = dar.initial_noise([5, 6], 16, CPU)
    assert together.shape == (2, 3, 16, 16) and together.dtype == torch.float32
    assert torch.equal(dar.initial_noise([6], 16, CPU)[0], together[1])
    assert not torch.equal(together[0], together[1])
    assert together.mean().abs() < 0.1 and abs(together.std() - 1) < 0.1


def test_no_two_generators_share_a_seed():
    generators = [g for purpose in (0, 1) for g in dar.picture_generators(list(range(500)), purpose, CPU)]
    assert len({g.initial_seed() for g in generators}) == 1000


# Prefix


@pytest.mark.parametrize("given", [0, 1, 12, 32])
def test_a_prefix_is_kept_as_given(small_ar, given):
    prefix = torch.randint(64, (2, given))
    codes = small_ar.generate(LABELS, seeds=2, prefix=prefix)
    assert codes.shape == (2, 32)
    assert torch.equal(codes[:, :given], prefix)
    one_for_all = small_ar.generate(LABELS, seeds=2, prefix=prefix[0])
    assert torch.equal(one_for_all[:, :given], prefix[:1].expand(2, -1))
    assert torch.equal(one_for_all, small_ar.generate(LABELS, seeds=2, prefix=prefix[:1].expand(2, -1)))
    if given == 0:
        assert torch.equal(codes, small_ar.generate(LABELS, seeds=2))


def test_what_follows_a_prefix_depends_on_it(small_ar):
    a = small_ar.generate(LABELS, cfg=None, greedy=True, prefix=torch.tensor([1, 2, 3]))
    b = small_ar.generate(LABELS, cfg=None, greedy=True, prefix=torch.tensor([1, 9, 3]))
    assert not torch.equal(a[:, 3:], b[:, 3:])


@pytest.mark.parametrize(
    "prefix",
    [
        torch.zeros(33, dtype=torch.int64),
        torch.zeros(2, 33, dtype=torch.int64),
        torch.zeros(3, 4, dtype=torch.int64),  # three rows for two pictures
        torch.zeros(1, 2, 4, dtype=torch.int64),
        torch.zeros(4),
        torch.tensor(3),
        torch.tensor([0, 64]),
        torch.tensor([-1]),
    ],
    ids=["too long", "too long each", "other batch", "3-D", "float", "0-D", "above the vocabulary", "negative"],
)
def test_a_prefix_that_does_not_fit_is_refused(small_ar, prefix):
    with pytest.raises(ValueError, match="prefix"):
        small_ar.generate(LABELS, prefix=prefix)


@pytest.mark.parametrize(
    "labels, named",
    [
        (torch.tensor([3, 11]), "class"),
        (torch.tensor([-1]), "class"),
        (torch.tensor([1.0]), "labels"),
        (torch.tensor([[1]]), "labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(small_ar, labels, named):
    with pytest.raises(ValueError, match=named):
        small_ar.generate(labels)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"num_tokens": 0},
        {"num_tokens": 33},
    ],
)
def test_settings_out_of_range_are_refused_by_name(small_ar, setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        small_ar.generate(LABELS, **setting)
