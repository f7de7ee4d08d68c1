"""Chapter 1, schedule and flow: the time shift, the group rules, the sampling steps and the two solvers."""

import math

import pytest
import torch

import dar

RULES = ("ceil", "nearest")
BETAS = (1.0, 2.0, 4.0)


def edges(num_groups: int, rule: str) -> list[float]:
    """The times s at which the groups 1, 2, ... begin."""
    if rule == "ceil":
        return [i / num_groups for i in range(1, num_groups)]
    return [(2 * i - 1) / (2 * num_groups) for i in range(1, num_groups)]


# Time shift


def test_eq8_by_hand():
    assert dar.shift_time(0.5, 2.0) == pytest.approx(1 / 3, abs=1e-15)
    assert dar.shift_time(0.2, 4.0) == pytest.approx(0.2 / 3.4, abs=1e-15)
    s = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(dar.shift_time(s, 2.0), torch.tensor([0, 1 / 7, 1 / 3, 1], dtype=torch.float64))


def test_eq5_by_hand():
    assert dar.unshift_time(1 / 3, 2.0) == pytest.approx(0.5, abs=1e-15)
    assert dar.unshift_time(0.2, 4.0) == pytest.approx(0.2 / 0.4, abs=1e-15)


@pytest.mark.parametrize("beta", BETAS)
def test_eq5_and_eq8_are_inverses(beta):
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(dar.unshift_time(dar.shift_time(s, beta), beta), s, rtol=0, atol=1e-14)
    torch.testing.assert_close(dar.shift_time(dar.unshift_time(s, beta), beta), s, rtol=0, atol=1e-14)
    for x in s.tolist():
        assert dar.unshift_time(dar.shift_time(x, beta), beta) == pytest.approx(x, abs=1e-14)
        assert dar.shift_time(dar.unshift_time(x, beta), beta) == pytest.approx(x, abs=1e-14)


@pytest.mark.parametrize("beta", BETAS)
def test_the_shift_keeps_both_ends_and_makes_early_times_denser(beta):
    assert dar.shift_time(0.0, beta) == 0 and dar.shift_time(1.0, beta) == 1
    assert dar.unshift_time(0.0, beta) == 0 and dar.unshift_time(1.0, beta) == 1
    s = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    if beta == 1:
        torch.testing.assert_close(dar.shift_time(s, beta), s)
    else:
        assert (dar.shift_time(s, beta) < s).all()


# Groups


def test_ceil_rule_is_eq5_between_the_edges():
    for num_groups in (1, 4, 8, 49):
        for s in torch.rand(200, dtype=torch.float64).tolist():
            assert dar.condition_group(s, num_groups, "ceil") == math.ceil(s * num_groups) - 1


def test_nearest_rule_rounds_to_the_nearest_group_between_the_edges():
    for num_groups in (1, 4, 8, 49):
        for s in torch.rand(200, dtype=torch.float64).tolist():
            expected = min(math.floor(s * num_groups + 0.5), num_groups - 1)
            assert dar.condition_group(s, num_groups, "nearest") == expected


def test_ceil_is_the_default():
    assert dar.condition_group(0.1, 8) == dar.condition_group(0.1, 8, "ceil") == 0
    assert dar.condition_group(0.1, 8, "nearest") == 1  # the first group owns half a K-th


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["float", torch.float32, torch.float64])
def test_at_s_equal_i_over_k_both_rules_give_group_i(rule, kind):
    for num_groups in range(1, 65):  # 49: (1/49)·49 < 1 in float64
        expected = list(range(num_groups))
        if kind == "float":
            groups = [dar.condition_group(i / num_groups, num_groups, rule) for i in expected]
        else:
            s = torch.arange(num_groups, dtype=kind) / num_groups
            groups = dar.condition_group(s, num_groups, rule).tolist()
        assert groups == expected, f"K = {num_groups}"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["float", torch.float32, torch.float64])
def test_a_group_begins_at_its_edge_and_not_one_number_earlier(rule, kind):
    for num_groups in range(2, 65):
        before, at = list(range(num_groups - 1)), list(range(1, num_groups))
        if kind == "float":
            s = edges(num_groups, rule)
            assert [dar.condition_group(math.nextafter(x, 0), num_groups, rule) for x in s] == before
            assert [dar.condition_group(x, num_groups, rule) for x in s] == at
            assert [dar.condition_group(math.nextafter(x, 1), num_groups, rule) for x in s] == at
        else:
            s = torch.tensor(edges(num_groups, rule), dtype=kind)
            below, above = torch.nextafter(s, torch.zeros_like(s)), torch.nextafter(s, torch.ones_like(s))
            assert dar.condition_group(below, num_groups, rule).tolist() == before
            assert dar.condition_group(s, num_groups, rule).tolist() == at
            assert dar.condition_group(above, num_groups, rule).tolist() == at


@pytest.mark.parametrize("rule", RULES)
def test_the_first_and_the_last_moment_have_a_group(rule):
    for num_groups in range(1, 65):
        assert dar.condition_group(0.0, num_groups, rule) == 0
        assert dar.condition_group(1.0, num_groups, rule) == num_groups - 1
        for dtype in (torch.float32, torch.float64):
            ends = dar.condition_group(torch.tensor([0.0, 1.0], dtype=dtype), num_groups, rule)
            assert ends.tolist() == [0, num_groups - 1]


@pytest.mark.parametrize("rule", RULES)
def test_tensors_and_floats_agree(rule):
    for num_groups in (1, 3, 8, 49):
        s = torch.cat((torch.rand(50, dtype=torch.float64), torch.arange(50, dtype=torch.float64) / 49))
        groups = dar.condition_group(s.clamp(0, 1), num_groups, rule)
        assert groups.tolist() == [dar.condition_group(x, num_groups, rule) for x in s.clamp(0, 1).tolist()]


def test_groups_are_integers_in_the_shape_of_the_times():
    groups = dar.condition_group(torch.rand(2, 3), 8, "nearest")
    assert groups.shape == (2, 3) and groups.dtype == torch.int64
    assert type(dar.condition_group(0.4, 8, "ceil")) is int and type(dar.condition_group(0.4, 8, "nearest")) is int


def test_an_unknown_rule_is_refused():
    for s in (0.5, torch.tensor([0.5])):
        with pytest.raises(ValueError, match="'middle'"):
            dar.condition_group(s, 8, "middle")


# The flow


def test_eq3_mixes_each_sample_at_its_own_time():
    x0, x1, t = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4), torch.tensor([0.0, 0.25, 1.0])
    x_t = dar.interpolate(x0, x1, t)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[2], x1[2])  # t = 0 is noise, t = 1 the image
    torch.testing.assert_close(x_t[1], 0.25 * x1[1] + 0.75 * x0[1])


def test_a_jump_along_the_true_velocity_lands_on_the_image_from_anywhere():
    x0, x1, t = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 4), torch.tensor([0.0, 0.3, 0.7, 1.0])
    torch.testing.assert_close(dar.jump_estimate(dar.interpolate(x0, x1, t), x1 - x0, t), x1)
    for time in t.tolist():  # one number for all, as in sampling
        x_t = dar.interpolate(x0, x1, torch.full((4,), time))
        torch.testing.assert_close(dar.jump_estimate(x_t, x1 - x0, time), x1)


# Sampling


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_steps", [1, 4, 8, 12])
def test_sampling_times_are_eq8(num_steps, beta):
    schedule = dar.sampling_schedule(num_steps, 8, beta, "ceil")
    expected = [i / num_steps / (i / num_steps + beta * (1 - i / num_steps)) for i in range(num_steps + 1)]
    assert [t for t, _, _ in schedule] == pytest.approx(expected[:-1], abs=1e-15)
    assert [t_next for _, t_next, _ in schedule] == pytest.approx(expected[1:], abs=1e-15)
    assert schedule[0][0] == 0 and schedule[-1][1] == 1


def test_the_group_of_a_step_is_that_of_its_start():
    for num_groups in (1, 4, 8, 49):
        for num_steps in range(1, 60):  # in integers, as no rounding can move them
            ceil = [i * num_groups // num_steps for i in range(num_steps)]
            near = [min((2 * i * num_groups + num_steps) // (2 * num_steps), num_groups - 1) for i in range(num_steps)]
            assert [g for _, _, g in dar.sampling_schedule(num_steps, num_groups, 2.0, "ceil")] == ceil
            assert [g for _, _, g in dar.sampling_schedule(num_steps, num_groups, 2.0, "nearest")] == near


@pytest.mark.parametrize("rule", RULES)
def test_with_as_many_steps_as_groups_each_group_is_used_once(rule):
    for num_groups in range(1, 65):
        schedule = dar.sampling_schedule(num_groups, num_groups, 2.0, rule)
        assert [group for _, _, group in schedule] == list(range(num_groups))


def test_no_steps_are_refused():
    for num_steps in (0, -1):
        with pytest.raises(ValueError, match=f"{num_steps} sampling steps"):
            dar.sampling_schedule(num_steps, 8, 2.0, "ceil")


# Solvers


def integrate(velocity, x, grid, solver):
    """The states at all times of the grid."""
    states, v_prev = [x], None
    for t, t_next in zip(grid[:-1], grid[1:]):
        v = velocity(states[-1], t)
        states.append(dar.solver_step(states[-1], v, v_prev, t_next - t, solver))
        v_prev = v
    return torch.stack(states)


def test_one_step_of_each_solver_by_hand():
    x, v, v_prev = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(dar.solver_step(x, v, v_prev, 0.25, "euler"), x + v / 4)
    torch.testing.assert_close(dar.solver_step(x, v, v_prev, 0.25, "ab2"), x + (3 * v - v_prev) / 8)
    torch.testing.assert_close(dar.solver_step(x, v, None, 0.25, "ab2"), x + v / 4)  # the first step is Euler's


@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_a_constant_velocity_is_integrated_exactly_on_any_grid(solver):
    x, v = torch.randn(2, 5, dtype=torch.float64)
    for grid in ([i / 8 for i in range(9)], [dar.shift_time(i / 8, 2.0) for i in range(9)]):
        expected = torch.stack([x + t * v for t in grid])
        torch.testing.assert_close(integrate(lambda x, t: v, x, grid, solver), expected, rtol=0, atol=1e-14)


def test_ab2_is_exact_for_a_linear_velocity_on_a_uniform_grid_from_the_second_step_on():
    x, a, b = torch.randn(3, 5, dtype=torch.float64)
    grid, h = [i / 8 for i in range(9)], 1 / 8
    exact = torch.stack([x + a * t + b * t**2 for t in grid])  # velocity a + 2 b t

    step = dar.solver_step(exact[1], a + 2 * b * h, a, h, "ab2")  # from the true second state
    torch.testing.assert_close(step, exact[2], rtol=0, atol=1e-14)

    states = integrate(lambda x, t: a + 2 * b * t, x, grid, "ab2")
    first_error = (b * h**2).expand(8, -1)  # Euler's, in the first step; no later step adds any
    torch.testing.assert_close(exact[1:] - states[1:], first_error, rtol=0, atol=1e-14)


def test_euler_errs_on_a_linear_velocity_in_every_step():
    x, a, b = torch.randn(3, 5, dtype=torch.float64)
    grid, h = [i / 8 for i in range(9)], 1 / 8
    states = integrate(lambda x, t: a + 2 * b * t, x, grid, "euler")
    exact = torch.stack([x + a * t + b * t**2 for t in grid])
    expected = torch.stack([i * b * h**2 for i in range(9)])
    torch.testing.assert_close(exact - states, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("ab2", 2)])
def test_order_of_accuracy_on_a_curved_path(solver, order):
    x = torch.tensor([1.0, 0.5], dtype=torch.float64)
    turn = torch.tensor([[0.0, -2.0], [2.0, 0.0]], dtype=torch.float64)  # a circle at angular speed 2
    exact = torch.linalg.matrix_exp(turn) @ x

    def error(num_steps):
        grid = [i / num_steps for i in range(num_steps + 1)]
        return (integrate(lambda x, t: turn @ x, x, grid, solver)[-1] - exact).norm().item()

    for num_steps in (64, 128, 256):
        assert math.log2(error(num_steps) / error(2 * num_steps)) == pytest.approx(order, abs=0.1)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="'heun'"):
        dar.solver_step(torch.zeros(1), torch.zeros(1), None, 0.1, "heun")
