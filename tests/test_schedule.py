"""Chapter 1, schedule and flow: times, groups, a step of the flow."""

import math

import pytest
import torch

import dar

RULES = ("ceil", "nearest")
BETAS = (1.0, 2.0, 8.0)


def test_the_example_of_the_chapter():
    s = torch.linspace(0, 1, 9)
    t = torch.tensor([0, 0.067, 0.143, 0.231, 0.333, 0.455, 0.6, 0.778, 1])
    torch.testing.assert_close(dar.shift_time(s, beta=2), t, rtol=0, atol=5e-4)
    assert dar.condition_group(s, 4, "ceil").tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert dar.condition_group(s, 4, "nearest").tolist() == [0, 1, 1, 2, 2, 3, 3, 3, 3]


# Time


def test_eq8_by_hand():
    assert dar.shift_time(0.5, 2.0) == pytest.approx(1 / 3)
    assert dar.shift_time(0.2, 4.0) == pytest.approx(0.2 / 3.4)


@pytest.mark.parametrize("beta", BETAS)
def test_eq5_and_eq8_are_inverses(beta):
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    there_and_back = dar.unshift_time(dar.shift_time(s, beta), beta)
    torch.testing.assert_close(there_and_back, s, rtol=0, atol=1e-14)
    back_and_there = dar.shift_time(dar.unshift_time(s, beta), beta)
    torch.testing.assert_close(back_and_there, s, rtol=0, atol=1e-14)


def test_early_flow_times_get_more_than_their_share():
    s = torch.rand(1000)
    assert (dar.shift_time(s, 2.0) < 0.5).float().mean() == pytest.approx(2 / 3, abs=0.05)
    assert torch.equal(dar.shift_time(s, 1.0), s)  # beta = 1: all times alike


# Groups


@pytest.mark.parametrize("num_groups", [1, 4, 8, 49])
def test_the_ceil_rule_is_eq5(num_groups):
    for s in torch.rand(200, dtype=torch.float64).tolist():
        group_from_one = math.ceil(s * num_groups)
        assert dar.condition_group(s, num_groups, "ceil") == group_from_one - 1


@pytest.mark.parametrize("num_groups", [1, 4, 8, 49])
def test_the_nearest_rule_rounds(num_groups):
    for s in torch.rand(200, dtype=torch.float64).tolist():
        nearest = min(math.floor(s * num_groups + 0.5), num_groups - 1)
        assert dar.condition_group(s, num_groups, "nearest") == nearest


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_i_over_k_both_rules_give_group_i(rule, dtype):
    for num_groups in range(1, 65):  # in float64, 1/49 · 49 < 1: a product would round wrongly
        s = torch.arange(num_groups, dtype=dtype) / num_groups
        assert dar.condition_group(s, num_groups, rule).tolist() == list(range(num_groups))


@pytest.mark.parametrize("rule, first_edge", [("ceil", 1.0), ("nearest", 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_begins_at_its_edge(rule, first_edge, dtype):
    """And not one representable number earlier."""
    for num_groups in range(2, 65):
        edges = torch.arange(num_groups - 1, dtype=dtype) + first_edge
        at = edges / num_groups
        before = torch.nextafter(at, torch.zeros_like(at))
        assert dar.condition_group(at, num_groups, rule).tolist() == list(range(1, num_groups))
        assert dar.condition_group(before, num_groups, rule).tolist() == list(range(num_groups - 1))


@pytest.mark.parametrize("rule", RULES)
def test_numbers_and_tensors_agree(rule):
    for num_groups in (1, 3, 8, 49):
        s = torch.cat((torch.rand(50).double(), torch.arange(num_groups + 1) / num_groups))
        groups = dar.condition_group(s, num_groups, rule)
        assert groups.dtype == torch.int64
        assert groups.tolist() == [dar.condition_group(x, num_groups, rule) for x in s.tolist()]


@pytest.mark.parametrize("s", [0.5, torch.tensor([0.5])])
def test_another_rule_is_refused(s):
    with pytest.raises(ValueError, match="'middle'"):
        dar.condition_group(s, 8, "middle")


# The flow


def test_eq3_mixes_each_image_at_its_own_time():
    x0, x1 = torch.randn(2, 3, 3, 4, 4)
    x_t = dar.interpolate(x0, x1, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(x_t[0], x0[0])  # t = 0 is noise
    torch.testing.assert_close(x_t[1], 0.25 * x1[1] + 0.75 * x0[1])
    assert torch.equal(x_t[2], x1[2])  # t = 1 is the image


def test_a_jump_along_the_true_velocity_lands_on_the_image():
    x0, x1 = torch.randn(2, 4, 3, 4, 4)
    t = torch.tensor([0.0, 0.3, 0.7, 1.0])
    x_t = dar.interpolate(x0, x1, t)
    torch.testing.assert_close(dar.jump_estimate(x_t, x1 - x0, t), x1)
    one = torch.tensor([0.3])  # a time for all, as in sampling
    x_t = dar.interpolate(x0, x1, one)
    torch.testing.assert_close(dar.jump_estimate(x_t, x1 - x0, one), x1)


# The steps that draw a picture


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_steps", [1, 4, 8, 12])
def test_steps_lie_at_the_times_of_eq8(num_steps, beta):
    schedule = dar.sampling_schedule(num_steps, 8, beta, "ceil")
    s = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    times = (s / (s + beta * (1 - s))).tolist()
    assert [step.t for step in schedule] == pytest.approx(times[:-1])
    assert [step.t_next for step in schedule] == pytest.approx(times[1:])
    assert schedule[-1].t_next == 1


def test_a_step_is_told_by_the_group_of_its_start():
    for num_groups in (1, 4, 8, 49):
        for num_steps in (1, 3, 4, 7, 8, 12, 16, 59):
            ceil = dar.sampling_schedule(num_steps, num_groups, 2.0, "ceil")
            nearest = dar.sampling_schedule(num_steps, num_groups, 2.0, "nearest")
            for i in range(num_steps):  # in integers, which no rounding can move
                assert ceil[i].group == i * num_groups // num_steps
                rounded = (2 * i * num_groups + num_steps) // (2 * num_steps)
                assert nearest[i].group == min(rounded, num_groups - 1)


@pytest.mark.parametrize("num_steps", [0, -1])
def test_no_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"{num_steps} sampling steps"):
        dar.sampling_schedule(num_steps, 8, 2.0, "ceil")


# Solvers


def integrate(velocity, x, num_steps, solver):
    """From t = 0 to 1 in equal steps: all states on the way."""
    h = 1 / num_steps
    states = [x]
    v_prev = None
    for i in range(num_steps):
        v = velocity(states[-1], i * h)
        states.append(dar.solver_step(states[-1], v, v_prev, h, solver))
        v_prev = v
    return torch.stack(states)


def test_a_step_of_each_solver_by_hand():
    x, v, v_prev = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(dar.solver_step(x, v, v_prev, 0.25, "euler"), x + v / 4)
    torch.testing.assert_close(dar.solver_step(x, v, v_prev, 0.25, "ab2"), x + (3 * v - v_prev) / 8)
    torch.testing.assert_close(dar.solver_step(x, v, None, 0.25, "ab2"), x + v / 4)


def test_ab2_errs_on_a_linear_velocity_in_its_first_step_alone():
    x, a, b = torch.randn(3, 5, dtype=torch.float64)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]
    exact = x + a * t + b * t**2  # its velocity is a + 2 b t
    errors = exact - integrate(lambda x, t: a + 2 * b * t, x, 8, "ab2")
    after_euler_step = (b / 64).expand(8, -1)
    torch.testing.assert_close(errors[1:], after_euler_step, rtol=0, atol=1e-14)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("ab2", 2)])
def test_half_the_step_divides_the_error_by_2_to_the_order(solver, order):
    x = torch.tensor([1.0, 0.5], dtype=torch.float64)
    turn = torch.tensor([[0.0, -2.0], [2.0, 0.0]], dtype=torch.float64)  # a circle
    exact = torch.linalg.matrix_exp(turn) @ x

    def error(num_steps):
        end = integrate(lambda x, t: turn @ x, x, num_steps, solver)[-1]
        return (end - exact).norm().item()

    assert math.log2(error(128) / error(256)) == pytest.approx(order, abs=0.1)


def test_another_solver_is_refused():
    with pytest.raises(ValueError, match="'heun'"):
        dar.solver_step(torch.zeros(1), torch.zeros(1), None, 0.1, "heun")
