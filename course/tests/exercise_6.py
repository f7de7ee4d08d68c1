"""Exercise 6: streaming and previews."""

import types

import torch
from torch import Tensor

import dar
from course.tests.support import check_close, check_equal, make_tokenizer

K = 4  # groups, of two tokens
LABELS = torch.tensor([0, 3, 1])
CODES = torch.randint(64, (3, 2 * K), generator=torch.Generator().manual_seed(1))


def velocity_of(x_t: Tensor, t: Tensor, group_z: Tensor) -> Tensor:
    """Instead of a network, so that a test can say what should come out."""
    return 0.3 * x_t + t.view(-1, 1, 1, 1) + group_z[..., 0].mean(1).view(-1, 1, 1, 1)


def tokenizer_with_calls():
    """A tokenizer whose velocity is the formula, and the list of the times that it was asked at."""
    tokenizer = make_tokenizer()
    times = []

    def velocity(x_t, t, group_z):
        times.append(t)
        return velocity_of(x_t, t, group_z)

    tokenizer.velocity = velocity
    return tokenizer, times


def group_counter(codes: Tensor):
    """The groups one by one, and a list that grows when one is taken."""
    taken = []

    def groups():
        for group in codes.split(2, 1):
            taken.append(group)
            yield group

    return groups(), taken


@torch.no_grad()
def expected_steps(tokenizer, noise: Tensor, num_steps: int, solver: str):
    """(x, previews so far) after each group, both divided by the data scale of 1/2."""
    z_prime = tokenizer.condition(CODES)
    x = noise
    before = None
    previews = []
    after_group = []
    schedule = dar.sampling_schedule(num_steps, K, 3.0, "ceil")
    for k in range(K):
        for t, t_next, group in schedule:
            if group == k:
                time = torch.tensor([t], dtype=torch.float32)
                v = velocity_of(x, time, z_prime[:, 2 * k : 2 * k + 2])
                previews.append(dar.jump_estimate(x, v, time) / 0.5)
                x = dar.solver_step(x, v, before, t_next - t, solver)
                before = v
        after_group.append((x / 0.5, list(previews)))
    return after_group


def check_denoise(num_steps: int, solver: str) -> None:
    tokenizer, times = tokenizer_with_calls()
    noise = torch.randn(3, 3, 8, 16)
    expected = expected_steps(tokenizer, noise, num_steps, solver)
    steps = list(dar.denoise(tokenizer, CODES.split(2, 1), noise, num_steps, solver))
    check_equal("how many StreamSteps", len(steps), K)
    check_equal("how many calls of velocity", len(times), num_steps)
    for k, step in enumerate(steps):
        promise = f"{num_steps} steps, {solver}, after group {k}"
        x, previews = expected[k]
        check_equal(f"{promise}: codes", step.codes, CODES[:, : 2 * k + 2])
        check_close(f"{promise}: x", step.x, x, 1e-3)
        check_equal(f"{promise}: how many previews", len(step.previews), len(previews))
        for actual, preview in zip(step.previews, previews):
            check_close(f"{promise}: a preview", actual, preview, 1e-3)


def test_one_step_for_each_group():
    check_denoise(K, "euler")


def test_ab2_looks_back_across_groups():
    check_denoise(K, "ab2")


def test_several_steps_for_a_group():
    check_denoise(3 * K, "ab2")


def test_groups_without_a_step():
    check_denoise(1, "ab2")
    check_denoise(2, "ab2")


def test_times_are_float32_tensors_of_one():
    tokenizer, times = tokenizer_with_calls()
    list(dar.denoise(tokenizer, CODES.split(2, 1), torch.randn(3, 3, 8, 8)))
    for t in times:
        assert t.shape == (1,) and t.dtype == torch.float32, f"a time is {t.dtype} {list(t.shape)}"
    expected = [step.t for step in dar.sampling_schedule(K, K, 3.0, "ceil")]
    check_close("the times of K steps", torch.cat(times), expected)


def test_a_step_is_taken_as_soon_as_its_group_is_there():
    tokenizer, times = tokenizer_with_calls()
    groups, taken = group_counter(CODES)
    steps = dar.denoise(tokenizer, groups, torch.randn(3, 3, 8, 8), 2 * K)
    for k in range(1, K + 1):
        next(steps)
        check_equal(f"groups taken for StreamStep {k}", len(taken), k)
        check_equal(f"calls of velocity for StreamStep {k}", len(times), 2 * k)


def test_fewer_groups_give_fewer_steps():
    tokenizer, times = tokenizer_with_calls()
    steps = list(dar.denoise(tokenizer, CODES[:, :4].split(2, 1), torch.randn(3, 3, 8, 8)))
    check_equal("StreamSteps of two groups", len(steps), 2)
    check_equal("calls of velocity", len(times), 2)


def test_the_config_says_how_many_steps():
    tokenizer = make_tokenizer(num_steps=6)
    tokenizer.velocity = velocity_of
    *_, last = dar.denoise(tokenizer, CODES.split(2, 1), torch.randn(3, 3, 8, 8))
    check_equal("previews, with num_steps = 6 in the config", len(last.previews), 6)


class StandInWriter:
    """Stands for generate_groups: notes its arguments, and gives the groups of CODES."""

    def __init__(self):
        self.settings = {}
        self.groups = 0

    def __call__(
        self, ar, labels, group_size, num_tokens=None, cfg=(1.1, 8.0), seeds=None, **settings
    ):
        self.settings = {"group_size": group_size, "cfg": cfg, "seeds": seeds, **settings}
        return self.write()

    def write(self):
        for group in CODES.split(2, 1):
            self.groups += 1
            yield group


def start_stream(tokenizer, **settings):
    """(writer, the first StreamStep, the stream), of a stream whose tokens the stand-in writes."""
    config = types.SimpleNamespace(vocab_size=64, num_tokens=8, num_classes=10)
    ar = types.SimpleNamespace(config=config, device=torch.device("cpu"))
    writer = StandInWriter()
    real = dar.generate_groups
    dar.generate_groups = writer
    try:
        steps = dar.stream(ar, tokenizer, LABELS, **settings)
        first = next(steps)
    finally:
        dar.generate_groups = real
    return writer, first, steps


def test_stream_shows_each_group_at_once():
    tokenizer, times = tokenizer_with_calls()
    writer, _, steps = start_stream(tokenizer, seeds=[4, 5, 6], num_steps=2 * K)
    check_equal("groups written for the first StreamStep", writer.groups, 1)
    check_equal("calls of velocity for it", len(times), 2)
    next(steps)
    check_equal("groups written for the second", writer.groups, 2)


def test_stream_hands_its_arguments_on():
    tokenizer, _ = tokenizer_with_calls()
    writer, _, _ = start_stream(tokenizer, cfg=(1.0, 3.0), seeds=[4, 5, 6], top_k=7)
    check_equal("group_size", writer.settings["group_size"], 2)
    check_equal("cfg", writer.settings["cfg"], (1.0, 3.0))
    check_equal("top_k", writer.settings["top_k"], 7)
    check_equal("seeds", list(writer.settings["seeds"]), [4, 5, 6])


def test_stream_starts_at_the_noise_of_the_seeds():
    tokenizer, _ = tokenizer_with_calls()
    _, _, steps = start_stream(tokenizer, seeds=[4, 5, 6], solver="euler")
    *_, last = steps
    noise = dar.initial_noise([4, 5, 6], 8, LABELS.device)
    *_, expected = dar.denoise(tokenizer, CODES.split(2, 1), noise, None, "euler")
    check_close("the picture", last.x, expected.x)


def test_stream_takes_a_noise_of_another_size():
    tokenizer, _ = tokenizer_with_calls()
    noise = torch.randn(3, 3, 16, 8)
    _, _, steps = start_stream(tokenizer, noise=noise)
    *_, last = steps
    *_, expected = dar.denoise(tokenizer, CODES.split(2, 1), noise)
    check_close("the picture", last.x, expected.x)


def test_noise_and_tokens_have_the_same_random_seeds():
    seen = []
    real = dar.initial_noise

    def note(seeds, *rest):
        seen.append(list(seeds))
        return real(seeds, *rest)

    dar.initial_noise = note
    try:
        tokenizer, _ = tokenizer_with_calls()
        writer, _, _ = start_stream(tokenizer)
    finally:
        dar.initial_noise = real
    check_equal("seeds of the tokens, and of the noise", list(writer.settings["seeds"]), seen[0])
    check_equal("how many", len(seen[0]), 3)
