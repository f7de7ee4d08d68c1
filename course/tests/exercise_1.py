"""Exercise 1: condition schedule and flow."""

import math

import torch

import dar
from course.tests.support import check_close, check_equal, check_refused

RULES = ("ceil", "nearest")


def edges(num_groups: int, rule: str) -> list[float]:
    """The times s at which the groups 1, 2, ... begin."""
    if rule == "ceil":
        return [i / num_groups for i in range(1, num_groups)]
    return [(2 * i - 1) / (2 * num_groups) for i in range(1, num_groups)]


def test_shift_time_is_eq8():
    check_close("s = 1/2, beta = 2", dar.shift_time(0.5, 2.0), 1 / 3, 1e-12)
    s = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    check_close("beta = 2, a tensor", dar.shift_time(s, 2.0), [0, 1 / 7, 1], 1e-12)
    check_close("beta = 1 changes nothing", dar.shift_time(s, 1.0), s, 1e-12)


def test_unshift_time_undoes_it():
    for beta in (1.0, 2.0, 4.0):
        for s in (0.0, 0.1, 0.5, 0.9, 1.0):
            back = dar.unshift_time(dar.shift_time(s, beta), beta)
            check_close(f"s = {s}, beta = {beta}", back, s, 1e-12)


def test_ceil_gives_every_group_one_kth():
    for num_groups in (1, 4, 8, 49):
        for s in torch.rand(100, dtype=torch.float64).tolist():
            group = dar.condition_group(s, num_groups)
            check_equal(f"s = {s}, K = {num_groups}", group, math.ceil(s * num_groups) - 1)


def test_nearest_gives_the_first_group_half_a_kth():
    check_equal("K = 8, s = 0.06", dar.condition_group(0.06, 8, "nearest"), 0)
    check_equal("K = 8, s = 0.07", dar.condition_group(0.07, 8, "nearest"), 1)
    check_equal("K = 8, s = 0.18", dar.condition_group(0.18, 8, "nearest"), 1)
    check_equal("K = 8, s = 0.19", dar.condition_group(0.19, 8, "nearest"), 2)
    check_equal("K = 8, s = 0.99", dar.condition_group(0.99, 8, "nearest"), 7)


def test_a_group_begins_at_its_edge_and_not_one_number_earlier():
    for rule in RULES:
        for num_groups in range(2, 65):
            promise = f"rule {rule}, K = {num_groups}"
            groups = list(range(1, num_groups))
            s = torch.tensor(edges(num_groups, rule), dtype=torch.float64)
            check_equal(f"{promise}, at edges", dar.condition_group(s, num_groups, rule), groups)
            numbers = [dar.condition_group(x, num_groups, rule) for x in s.tolist()]
            check_equal(f"{promise}, at edges, as numbers", numbers, groups)
            before = torch.nextafter(s, torch.zeros_like(s))
            groups = list(range(num_groups - 1))
            found = dar.condition_group(before, num_groups, rule)
            check_equal(f"{promise}, one float before the edges", found, groups)


def test_float32_times_have_the_same_groups():
    for rule in RULES:
        for num_groups in range(2, 65):
            s = torch.tensor(edges(num_groups, rule), dtype=torch.float32)
            found = dar.condition_group(s, num_groups, rule)
            check_equal(f"rule {rule}, K = {num_groups}", found, list(range(1, num_groups)))


def test_groups_are_whole_numbers_in_the_shape_of_the_times():
    groups = dar.condition_group(torch.rand(2, 3), 8)
    check_equal("the shape of times [2, 3]", list(groups.shape), [2, 3])
    assert groups.dtype == torch.int64, f"groups are {groups.dtype}, not int64"
    assert type(dar.condition_group(0.4, 8)) is int, "the group of a number is no int"
    just_before = 0.5 - 1e-12  # which float32 would round to 0.5
    check_equal("a number just before an edge", dar.condition_group(just_before, 8), 3)
    ends = dar.condition_group(torch.tensor([0.0, 1.0]), 8)
    check_equal("the first and the last moment", ends, [0, 7])


def test_an_unknown_rule_is_refused():
    check_refused("a number", "middle", dar.condition_group, 0.5, 8, "middle")
    check_refused("a tensor", "middle", dar.condition_group, torch.zeros(2), 8, "middle")


def test_interpolate_takes_each_image_at_its_own_time():
    x0, x1 = torch.randn(2, 3, 3, 4, 4)
    x_t = dar.interpolate(x0, x1, torch.tensor([0.0, 0.25, 1.0]))
    check_close("t = 0 is noise", x_t[0], x0[0])
    check_close("t = 1/4", x_t[1], x0[1] + (x1[1] - x0[1]) / 4)
    check_close("t = 1 is the image", x_t[2], x1[2])


def test_a_jump_along_the_true_velocity_lands_on_the_image():
    x0, x1 = torch.randn(2, 4, 3, 4, 4)
    t = torch.tensor([0.0, 0.3, 0.7, 1.0])
    x_t = torch.stack([x0[i] + t[i] * (x1[i] - x0[i]) for i in range(4)])
    check_close("four times", dar.jump_estimate(x_t, x1 - x0, t), x1)
    x_t = x0 + 0.3 * (x1 - x0)
    check_close("t [1], for all", dar.jump_estimate(x_t, x1 - x0, torch.tensor([0.3])), x1)


def test_steps_begin_and_end_at_eq8s_times():
    steps = dar.sampling_schedule(4, 8, 2.0, "ceil")
    check_close("starts", torch.tensor([step.t for step in steps]), [0, 1 / 7, 1 / 3, 3 / 5])
    check_close("ends", torch.tensor([step.t_next for step in steps]), [1 / 7, 1 / 3, 3 / 5, 1])


def test_a_step_has_the_group_of_its_start():
    for num_groups in (1, 4, 8, 49):
        for num_steps in range(1, 60):
            steps = dar.sampling_schedule(num_steps, num_groups, 2.0, "ceil")
            expected = [i * num_groups // num_steps for i in range(num_steps)]
            promise = f"{num_steps} steps, K = {num_groups}"
            check_equal(promise, [step.group for step in steps], expected)


def test_no_steps_are_refused():
    check_refused("0 steps", "0 sampling steps", dar.sampling_schedule, 0, 8, 2.0, "ceil")


def test_euler_is_exact_where_the_velocity_is_constant():
    x, v = torch.randn(2, 5)
    check_close("a step of 1/4", dar.solver_step(x, v, None, 0.25, "euler"), x + v / 4)
    other = torch.randn(5)
    check_close("v_prev is ignored", dar.solver_step(x, v, other, 0.25, "euler"), x + v / 4)


def test_ab2_is_exact_where_the_velocity_is_a_line():
    a, b = torch.randn(2, 5)
    path = [a * t + b * t**2 for t in (0.0, 0.25, 0.5)]
    velocity = [a + 2 * b * t for t in (0.0, 0.25)]
    end = dar.solver_step(path[1], velocity[1], velocity[0], 0.25, "ab2")
    check_close("the second of two equal steps", end, path[2])


def test_ab2_begins_with_eulers_step():
    x, v = torch.randn(2, 5)
    check_close("without v_prev", dar.solver_step(x, v, None, 0.25, "ab2"), x + v / 4)


def test_an_unknown_solver_is_refused():
    x = torch.zeros(1)
    check_refused("another name", "heun", dar.solver_step, x, x, None, 0.1, "heun")
