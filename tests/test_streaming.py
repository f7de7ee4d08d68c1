"""Chapter 8: pictures while the tokens are still being written (Fig. 1, section 3.3)."""

import math

import pytest
import torch

import dar

LABELS = torch.tensor([3, 7, 1])
STEPS_AND_SOLVERS = [(steps, solver) for steps in (4, 8, 12) for solver in ("euler", "ab2")]


def run(ar, tokenizer, labels=LABELS, **settings) -> list[dar.StreamStep]:
    return list(dar.stream(ar, tokenizer, labels, **{"seeds": 5} | settings))


def count_runs(module, counts: list) -> torch.utils.hooks.RemovableHandle:
    return module.register_forward_pre_hook(lambda *_: counts.append(1))


@pytest.mark.parametrize("rule", ["ceil", "nearest"])
@pytest.mark.parametrize("steps, solver", STEPS_AND_SOLVERS)
def test_stream_previews_and_decode_agree_bit_for_bit(small_ar, make_tokenizer, steps, solver, rule):
    tokenizer = make_tokenizer(group_rule=rule)
    noise = torch.randn(3, 3, 32, 32)
    streamed = run(small_ar, tokenizer, noise=noise, num_steps=steps, solver=solver)
    codes = streamed[-1].codes
    assert torch.equal(streamed[-1].x, tokenizer.decode(codes, noise, steps, solver))

    previews = tokenizer.previews(codes, noise, steps, solver)
    assert previews.shape == (steps, 3, 3, 32, 32)
    groups = [group for _, _, group in dar.sampling_schedule(steps, 8, 2.0, rule)]
    for k, step in enumerate(streamed):  # the newest preview: that of the last step whose group is there
        newest = max(i for i in range(steps) if groups[i] <= k)
        assert torch.equal(step.preview, previews[newest])


@pytest.mark.parametrize("steps, solver", STEPS_AND_SOLVERS)
@torch.no_grad()
def test_stream_is_the_sampler_of_the_paper(small_ar, small_tokenizer, steps, solver):
    """Against section 4 written out: z' in one pass, then every step in its turn."""
    c, noise = small_tokenizer.config, torch.randn(3, 3, 32, 32)
    streamed = run(small_ar, small_tokenizer, noise=noise, num_steps=steps, solver=solver)
    groups = small_tokenizer.condition(streamed[-1].codes).split(4, 1)
    x, before, xs, previews = noise, None, {}, {}
    for i in range(steps):
        t, t_next = (s / (s + c.time_shift * (1 - s)) for s in (i / steps, (i + 1) / steps))
        k = math.floor(8 * i / steps)  # "ceil"
        v, _ = small_tokenizer.diffusion(x, torch.full((3,), t), groups[k])
        previews[k] = (x + (1 - t) * v) / c.data_scale
        x = x + (t_next - t) * (v if before is None or solver == "euler" else 1.5 * v - 0.5 * before)
        before, xs[k] = v, x / c.data_scale
    for k, step in enumerate(streamed):
        newest = max(j for j in xs if j <= k)
        torch.testing.assert_close(step.x, xs[newest], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step.preview, previews[newest], rtol=1e-4, atol=1e-4)


def test_with_euler_the_last_preview_is_the_picture_and_with_ab2_another(small_ar, small_tokenizer):
    last = run(small_ar, small_tokenizer, solver="euler")[-1]
    torch.testing.assert_close(last.preview, last.x, rtol=1e-5, atol=1e-5)
    last = run(small_ar, small_tokenizer, solver="ab2")[-1]
    assert (last.preview - last.x).abs().max() > 1e-3


def test_one_yield_for_each_group_with_the_tokens_so_far(small_ar, small_tokenizer):
    streamed = run(small_ar, small_tokenizer, cfg=(1.1, 4.0), temperature=0.9, top_k=40, top_p=0.95)
    codes = small_ar.generate(LABELS, seeds=5, cfg=(1.1, 4.0), temperature=0.9, top_k=40, top_p=0.95)
    assert len(streamed) == 8
    for k, step in enumerate(streamed):
        assert torch.equal(step.codes, codes[:, : 4 * (k + 1)])
        assert step.x.shape == step.preview.shape == (3, 3, 32, 32)
        assert step.x.dtype == step.preview.dtype == torch.float32


def test_a_group_is_denoised_as_soon_as_its_tokens_are_there(small_ar, small_tokenizer):
    tokens, steps = [], []
    hooks = [count_runs(small_ar.norm, tokens), count_runs(small_tokenizer.diffusion, steps)]
    for k, _ in enumerate(dar.stream(small_ar, small_tokenizer, LABELS, seeds=5), 1):
        assert len(tokens) == 4 * k
        assert len(steps) == k
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("steps", [3, 8, 20])
def test_previews_cost_no_network_call(small_ar, small_tokenizer, steps):
    calls = []
    hook = count_runs(small_tokenizer.diffusion, calls)
    run(small_ar, small_tokenizer, num_steps=steps)
    hook.remove()
    assert len(calls) == steps


def test_with_fewer_steps_than_groups_a_round_without_a_step_repeats_the_last(small_ar, small_tokenizer):
    streamed = run(small_ar, small_tokenizer, num_steps=4)  # "ceil": steps at groups 0, 2, 4 and 6
    for k in range(1, 8):
        same = torch.equal(streamed[k].x, streamed[k - 1].x), torch.equal(streamed[k].preview, streamed[k - 1].preview)
        assert same == ((True, True) if k % 2 else (False, False))


def test_a_single_step_needs_the_first_group_alone(small_ar, small_tokenizer):
    streamed = run(small_ar, small_tokenizer, num_steps=1)
    assert all(torch.equal(step.x, streamed[0].x) for step in streamed)
    torch.testing.assert_close(streamed[0].preview, streamed[0].x, rtol=1e-5, atol=1e-5)


def test_the_number_of_steps_is_the_tokenizers_unless_given(small_ar, make_tokenizer):
    tokenizer, calls = make_tokenizer(num_steps=5), []
    count_runs(tokenizer.diffusion, calls)
    run(small_ar, tokenizer)
    assert len(calls) == 5


def test_a_partial_decoding_is_the_preview_at_its_group(small_ar, small_tokenizer):
    noise = torch.randn(3, 3, 32, 32)
    streamed = run(small_ar, small_tokenizer, noise=noise)
    for k in (2, 4, 6):
        partial = small_tokenizer.decode(streamed[-1].codes[:, : 4 * k], noise)
        assert torch.equal(partial, streamed[k - 1].preview)


def test_a_stream_left_early_has_run_no_network_further(small_ar, small_tokenizer):
    """Partial decoding costs what it shows (Table 5): 12 of 32 tokens and 3 of 8 steps."""
    tokens, steps = [], []
    hooks = [count_runs(small_ar.norm, tokens), count_runs(small_tokenizer.diffusion, steps)]
    noise = torch.randn(3, 3, 32, 32)
    for step in dar.stream(small_ar, small_tokenizer, LABELS, seeds=5, noise=noise):
        if step.codes.shape[1] == 12:
            break
    assert (len(tokens), len(steps)) == (12, 3)
    for hook in hooks:
        hook.remove()
    assert torch.equal(step.preview, small_tokenizer.decode(step.codes, noise))


def test_a_later_group_changes_nothing_before_it(small_ar, small_tokenizer):
    noise = torch.randn(3, 3, 32, 32)
    prefix = torch.arange(32)
    first = run(small_ar, small_tokenizer, noise=noise, prefix=prefix)
    prefix[17] = 63  # in group 4
    second = run(small_ar, small_tokenizer, noise=noise, prefix=prefix)
    equal = [torch.equal(a.x, b.x) and torch.equal(a.preview, b.preview) for a, b in zip(first, second)]
    assert equal == [True] * 4 + [False] * 4


def test_seeds_decide_noise_and_tokens(small_ar, small_tokenizer):
    first, again, other = (run(small_ar, small_tokenizer, seeds=seeds)[-1] for seeds in (5, [5, 6, 7], [5, 6, 8]))
    assert torch.equal(first.codes, again.codes) and torch.equal(first.x, again.x)
    assert torch.equal(first.codes[:2], other.codes[:2]) and torch.equal(first.x[:2], other.x[:2])
    assert not torch.equal(first.codes[2], other.codes[2]) and not torch.equal(first.x[2], other.x[2])
    noise = dar.initial_noise([5, 6, 7], 32, torch.device("cpu"))
    assert torch.equal(first.x, small_tokenizer.decode(first.codes, noise))


def test_greedy_pictures_still_have_their_own_noise(small_ar, small_tokenizer):
    labels = torch.tensor([3, 3])
    step = run(small_ar, small_tokenizer, labels, greedy=True)[-1]
    assert torch.equal(step.codes[0], step.codes[1])
    assert not torch.equal(step.x[0], step.x[1])


def test_without_seeds_every_run_is_another(small_ar, small_tokenizer):
    first, second = (run(small_ar, small_tokenizer, seeds=None)[-1] for _ in range(2))
    assert not torch.equal(first.codes, second.codes)
    assert not torch.equal(first.x, second.x)


def test_noise_sets_the_size(small_ar, small_tokenizer):
    step = run(small_ar, small_tokenizer, noise=torch.randn(3, 3, 16, 48))[-1]
    assert step.x.shape == (3, 3, 16, 48)


def test_a_picture_does_not_depend_on_its_batch_up_to_rounding(small_ar, small_tokenizer):
    together = run(small_ar, small_tokenizer)
    for i in range(3):
        alone = run(small_ar, small_tokenizer, LABELS[i : i + 1], seeds=[5 + i])
        for a, b in zip(together, alone):
            assert torch.equal(a.codes[i], b.codes[0])
            torch.testing.assert_close(a.x[i], b.x[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(a.preview[i], b.preview[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [1, 4, 10, 32])
def test_stream_with_a_prefix(small_ar, small_tokenizer, given):
    prefix = torch.randint(64, (3, given))
    streamed = run(small_ar, small_tokenizer, prefix=prefix)
    codes = small_ar.generate(LABELS, seeds=5, prefix=prefix)
    assert torch.equal(codes[:, :given], prefix)
    assert [step.codes.shape[1] for step in streamed] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert torch.equal(streamed[-1].codes, codes)
    assert torch.equal(streamed[0].codes, codes[:, :4])
    noise = dar.initial_noise([5, 6, 7], 32, torch.device("cpu"))  # the prefix leaves x0 alone
    assert torch.equal(streamed[-1].x, small_tokenizer.decode(codes, noise))


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"solver": "heun"}, "heun"),
        ({"num_steps": -1}, "-1"),
        ({"seeds": [1]}, "seeds"),
        ({"noise": torch.zeros(3, 3, 30, 32)}, "noise"),
        ({"noise": torch.zeros(3, 4, 32, 32)}, "noise"),
        ({"noise": torch.zeros(2, 3, 32, 32)}, "noise"),  # two for three pictures
        ({"cfg": "4"}, "guidance"),
    ],
)
def test_settings_that_do_not_fit_are_refused(small_ar, small_tokenizer, settings, named):
    with pytest.raises(ValueError, match=named):
        run(small_ar, small_tokenizer, **settings)


@pytest.mark.parametrize("fields, named", [({"codebook_size": 50}, "64.* 50"), ({"num_tokens": 24}, "32.* 24")])
def test_a_tokenizer_of_another_model_is_refused(small_ar, make_tokenizer, fields, named):
    with pytest.raises(ValueError, match=named):
        run(small_ar, make_tokenizer(**fields))
