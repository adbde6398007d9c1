"""The budget of a run in steps, images and minutes: against closed forms, and with machines that change their speed."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest

from training.budget import DEFAULT_MINUTES, TRUSTED, Budget, learning_rate, with_defaults
from training.config import Config
from training.loop import seconds_left
from training.run.state import TrainingState


def make_config(**settings):
    return Config(**{"output_dir": "run", "dataset_name": "moons"} | settings)


def simulate(budget, seconds_of_step, state=(0, 0.0), stop_at=math.inf):
    """Train on a machine on which step n takes so many seconds.

    Returns:
        The share after each step from the first, and the training time at the end.
    """
    step, seconds = state
    shares = []
    while budget.share(step) < 1 and step < stop_at:
        step += 1
        seconds += seconds_of_step(step)
        if budget.reads_clock(step):
            budget.read_clock(step, seconds)
        shares.append(budget.share(step))
        assert step < 10**6
    return shares, seconds


def test_a_budget_in_steps_needs_no_clock():
    budget = Budget(steps=7)
    shares, _ = simulate(budget, lambda n: 1e9)
    assert shares == [n / 7 for n in range(1, 8)]
    assert not any(budget.reads_clock(n) for n in range(100))


@pytest.mark.parametrize("steps_in_all", [3, 40, 700, 20_000])
def test_a_budget_in_minutes_is_used_up_evenly_and_in_time(steps_in_all):
    budget = Budget(seconds=600)
    shares, seconds = simulate(budget, lambda n: 600 / steps_in_all)
    assert abs(len(shares) - steps_in_all) <= 1
    assert seconds == pytest.approx(600, abs=1.01 * 600 / steps_in_all)
    for n, share in enumerate(shares, start=1):
        assert share == pytest.approx(n / steps_in_all, abs=1.01 / steps_in_all)


@pytest.mark.parametrize(
    "seconds_of_step",
    [
        lambda n: 30.0 if n == 1 else 0.5,  # what comes first takes longer
        lambda n: 0.5 if n < 600 else 1.5,  # a neighbour comes
        lambda n: 1.5 if n < 200 else 0.3,  # and goes
        lambda n: 0.5 + 0.4 * math.sin(n),
        lambda n: 60.0,
    ],
)
def test_whatever_the_speed_does_the_share_grows_to_1_in_time(seconds_of_step):
    budget = Budget(seconds=600)
    shares, seconds = simulate(budget, seconds_of_step)
    assert all(0 <= before <= after for before, after in pairwise([0.0, *shares]))
    assert shares[-1] == 1
    last = seconds_of_step(len(shares))
    assert 0.97 * 600 - last <= seconds <= 1.03 * 600 + last
    steps = [after - before for before, after in pairwise(shares[TRUSTED:])]
    assert not steps or max(steps) < 0.1  # nor does the learning rate jump


@pytest.mark.parametrize("steps_in_all", [8, 20, 50])
def test_with_a_limit_in_steps_too_a_few_slow_steps_are_a_whole_run(steps_in_all):
    """The time ends it before it has had as many steps as are needed to trust their speed."""
    budget = Budget(steps=5000, seconds=600)
    shares, seconds = simulate(budget, lambda n: 600 / steps_in_all)
    assert seconds == pytest.approx(600, abs=1.01 * 600 / steps_in_all)
    assert all(before < after for before, after in pairwise(shares)) and shares[-1] == 1
    assert shares[len(shares) // 2] < 0.7  # it grows bit by bit


def test_a_first_step_that_takes_long_changes_nothing_where_time_will_do():
    budget = Budget(steps=1000, seconds=600)
    shares, _ = simulate(budget, lambda n: 140.0 if n == 1 else 0.4)
    assert shares == [n / 1000 for n in range(1, 1001)]


@pytest.mark.parametrize("steps", [1000, math.inf])
def test_less_time_than_a_step(steps):
    shares, seconds = simulate(Budget(steps=steps, seconds=1e-9), lambda n: 5.0)
    assert (shares, seconds) == ([1.0], 5.0)


def test_with_two_limits_the_clock_counts_only_if_time_will_not_do():
    fast = Budget(steps=1000, seconds=600)
    shares, _ = simulate(fast, lambda n: 30.0 if n == 1 else 0.1)
    assert shares == [n / 1000 for n in range(1, 1001)]
    slow = Budget(steps=1000, seconds=600)
    shares, seconds = simulate(slow, lambda n: 2.0)
    assert len(shares) == pytest.approx(300, abs=3) and seconds == pytest.approx(600, abs=6)
    assert shares[-1] == 1 and all(before <= after for before, after in pairwise(shares))


@pytest.mark.parametrize("limits", [{"steps": 500}, {"seconds": 600}, {"steps": 2000, "seconds": 600}])
def test_a_resumed_run_has_the_shares_that_it_would_have_had(limits):
    def seconds_of_step(n):
        return 1.0 + 0.5 * math.sin(n)

    whole, _ = simulate(Budget(**limits), seconds_of_step)
    first = Budget(**limits)
    before, seconds = simulate(first, seconds_of_step, stop_at=137)
    second = Budget(**limits)
    second.load_state_dict(first.state_dict(), 137, seconds)
    after, _ = simulate(second, seconds_of_step, state=(137, seconds))
    assert before + after == whole


def test_a_run_that_is_resumed_with_other_limits():
    first = Budget(seconds=600)
    simulate(first, lambda n: 1.0, stop_at=300)
    longer = Budget(seconds=1200)
    longer.load_state_dict(first.state_dict(), 300, 300.0)
    assert longer.share(300) == pytest.approx(0.25)
    shares, seconds = simulate(longer, lambda n: 1.0, state=(300, 300.0))
    assert len(shares) == pytest.approx(900, abs=2) and seconds == pytest.approx(1200, abs=2)
    in_steps = Budget(steps=400)
    in_steps.load_state_dict(first.state_dict(), 300, 300.0)
    assert in_steps.share(300) == 0.75 and in_steps.share(400) == 1
    shorter = Budget(seconds=200)
    shorter.load_state_dict(first.state_dict(), 300, 300.0)
    assert shorter.share(300) == 1
    of_earlier_version = Budget(steps=400, seconds=600)
    of_earlier_version.load_state_dict(None, 100, 50.0)
    assert of_earlier_version.share(100) == 0.25


@pytest.mark.parametrize("steps", [1, 3, 10, 17, 100, 99_999])
def test_each_tenth_of_a_run_ends_once(steps):
    budget = Budget(steps=steps)
    ends = [n for n in range(1, steps + 1) if budget.ends_part(n)]
    assert ends == sorted({math.ceil(part * steps / 10) for part in range(1, 11)})


@pytest.mark.parametrize(
    ("settings", "steps", "minutes"),
    [
        ({}, math.inf, DEFAULT_MINUTES),
        ({"max_train_steps": 5}, 5, math.inf),
        ({"max_train_minutes": 5}, math.inf, 5),
        ({"max_train_images": 1000}, 16, math.inf),
        ({"max_train_images": 1}, 1, math.inf),
        ({"max_train_images": 1000, "max_train_steps": 10, "max_train_minutes": 2}, 10, 2),
    ],
)
def test_limits_of_the_settings(settings, steps, minutes):
    budget = Budget.of(make_config(**settings), global_batch=64)
    assert (budget.steps, budget.seconds) == (steps, 60 * minutes)


# ---- The learning rate -----------------------------------------------------------------------------------------------


def rates(steps, **settings):
    """The learning rate as a function of the step."""
    config = make_config(learning_rate=0.1, max_train_steps=steps, **settings)
    budget = Budget.of(config, 64)
    return lambda step: learning_rate(config, budget, step)


def test_learning_rate_schedules_at_their_corners():
    constant, linear, cosine = (
        rates(100, lr_warmup_steps=10, lr_scheduler=kind) for kind in ("constant", "linear", "cosine")
    )
    assert [constant(n) for n in (1, 5, 10, 11, 100)] == pytest.approx([0.01, 0.05, 0.1, 0.1, 0.1])
    assert [linear(n) for n in (1, 11, 51, 100)] == pytest.approx([0.01, 0.09, 0.05, 0.001])
    assert cosine(26) == pytest.approx(0.1 * math.cos(math.pi / 8) ** 2)
    assert cosine(51) == pytest.approx(0.05)
    assert cosine(100) == pytest.approx(0.1 * math.sin(math.pi / 200) ** 2)
    for rate in (linear, cosine):
        values = [rate(n) for n in range(1, 101)]
        assert min(values) > 0  # every step learns
        assert all(before >= after for before, after in pairwise(values[10:]))
        assert rate(101) == pytest.approx(0, abs=1e-17)


def test_hold_is_constant_until_the_last_fifth_and_then_falls_linearly_to_0():
    hold = rates(1000, lr_warmup_steps=10, lr_scheduler="hold")
    corners = {1: 0.01, 5: 0.05, 10: 0.1, 11: 0.1, 500: 0.1, 800: 0.1, 801: 0.1, 802: 0.0995, 851: 0.075, 901: 0.05,
               951: 0.025, 1000: 0.0005}  # fmt: skip
    assert [hold(n) for n in corners] == pytest.approx(list(corners.values()))
    assert hold(1001) == 0
    no_warm_up = rates(5, lr_warmup_steps=0, lr_scheduler="hold")
    assert [no_warm_up(n) for n in range(1, 6)] == pytest.approx([0.1] * 5)  # its last fifth is one step
    late = rates(10, lr_warmup_steps=20, lr_scheduler="hold")  # a warm-up that goes on in the last fifth
    assert [late(n) for n in (8, 9, 10)] == pytest.approx([0.04, 0.045, 0.05 / 2])


def test_the_warm_up_that_is_not_given_is_short_in_a_short_run():
    short, long = rates(200, lr_scheduler="constant"), rates(100_000, lr_scheduler="constant")
    assert [short(n) for n in (1, 5, 10, 11)] == pytest.approx([0.01, 0.05, 0.1, 0.1])
    assert [long(n) for n in (1, 250, 500, 501)] == pytest.approx([0.0002, 0.05, 0.1, 0.1])
    assert rates(200, lr_warmup_steps=0)(1) == 0.1
    assert rates(10, lr_warmup_steps=20, lr_scheduler="constant")(10) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("settings", "millions", "trained", "expected"),
    [
        ({}, 2, None, 2e-3),  # with Muon
        ({"optimizer": "adamw"}, 2, None, 1e-3),
        ({}, 36, None, 2e-4),
        ({"optimizer": "muon"}, 36, None, 2e-4),
        ({"init_from": "user/model"}, 2, None, 1e-4),
        ({"init_from": "user/model"}, 36, None, 1e-4),
        ({"learning_rate": 5e-4}, 2, None, 5e-4),
        ({"learning_rate": 5e-4, "init_from": "user/model"}, 36, None, 5e-4),
        ({}, 2, {"optimizer": "muon", "learning_rate": 1e-3}, 1e-3),  # of a version with another default
        ({"learning_rate": 5e-4}, 2, {"optimizer": "muon", "learning_rate": 1e-3}, 5e-4),
    ],
)
def test_the_learning_rate_that_is_not_given_depends_on_network_optimizer_and_checkpoint(
    settings, millions, trained, expected
):
    assert with_defaults(make_config(**settings), int(millions * 1e6), trained).learning_rate == expected


@pytest.mark.parametrize(
    ("settings", "millions", "trained", "expected"),
    [
        ({}, 2, None, "muon"),
        ({}, 36, None, "adamw"),  # not measured
        ({"init_from": "user/model"}, 2, None, "adamw"),
        ({"optimizer": "adamw"}, 2, None, "adamw"),
        ({"optimizer": "muon", "init_from": "user/model"}, 36, None, "muon"),
        ({}, 36, {"optimizer": "muon"}, "muon"),  # a run goes on with its optimizer
        ({}, 2, {"optimizer": "adamw"}, "adamw"),
        ({}, 2, {"seed": 0}, "adamw"),  # of a version without the setting
        ({"optimizer": "muon"}, 2, {"optimizer": "adamw"}, "muon"),  # which check_same_run refuses
    ],
)
def test_the_optimizer_that_is_not_given_depends_on_the_network_and_the_checkpoint(
    settings, millions, trained, expected
):
    assert with_defaults(make_config(**settings), int(millions * 1e6), trained).optimizer == expected


@pytest.mark.parametrize(
    ("settings", "trained", "expected"),
    [
        ({}, None, "logit_normal"),
        ({"timestep_sampling": "stratified"}, None, "stratified"),
        ({"prediction_type": "epsilon"}, None, "uniform"),  # not measured
        ({"loss_weighting": "min_snr"}, None, "uniform"),
        ({"variance_type": "learned_range"}, None, "uniform"),
        ({}, {"timestep_sampling": "importance"}, "importance"),  # a run goes on with its timesteps
        ({}, {"seed": 0}, "uniform"),  # of a version without the setting
        ({"timestep_sampling": "uniform"}, {"timestep_sampling": "importance"}, "uniform"),
    ],
)
def test_the_timesteps_that_are_not_given_depend_on_what_is_learned_and_the_checkpoint(settings, trained, expected):
    assert with_defaults(make_config(**settings), 2_000_000, trained).timestep_sampling == expected


@pytest.mark.parametrize("kind", ["cosine", "hold"])
def test_in_minutes_the_learning_rate_falls_as_in_steps(kind):
    config = make_config(learning_rate=0.1, max_train_minutes=10, lr_scheduler=kind)
    budget = Budget.of(config, 64)
    seconds, found = 0.0, []
    while budget.share(len(found)) < 1:
        found.append(learning_rate(config, budget, len(found) + 1))
        seconds += 0.5
        if budget.reads_clock(len(found)):
            budget.read_clock(len(found), seconds)
    in_steps = rates(len(found), lr_scheduler=kind)
    assert len(found) == pytest.approx(1200, abs=2)
    tolerance = 2e-4 if kind == "cosine" else 1e-3  # a step more or less, and the largest slope of the decay
    assert found[60:] == pytest.approx([in_steps(n) for n in range(61, len(found) + 1)], abs=tolerance)


# ---- The time left ---------------------------------------------------------------------------------------------------


def stand_in(budget, **settings):
    """A run of 8 images a step, whose validation sends 600 images through the network."""
    config = make_config(num_sample_images=10, ddpm_num_inference_steps=30, **settings)
    record, validator = SimpleNamespace(global_batch=8), SimpleNamespace(network_images=600)
    return SimpleNamespace(config=config, budget=budget, record=record, validator=validator)


def test_the_time_left_counts_validations_and_samples_to_come():
    state = TrainingState(step=500)
    often = stand_in(Budget(steps=1000), validation_steps=100, save_images_steps=250)
    # Before the first pause: a third of a training image for each image that goes through the network.
    validation, samples = 600 / 3 / 8, 300 / 3 / 8
    assert seconds_left(often, state, 1.0) == pytest.approx(500 + 5 * validation + 2 * samples + validation + samples)
    never = stand_in(Budget(steps=1000), validation_steps=0, save_images_steps=0)
    assert seconds_left(never, state, 2.0) == pytest.approx(1000 + 2 * (validation + samples))
    state.clock.pauses, state.clock.paused_seconds = 4, 20.0  # now it is known that one takes 5 seconds
    assert seconds_left(often, state, 1.0) == pytest.approx(500 + 7 * 5 + 2 * 5)
    now_and_then = stand_in(Budget(steps=1000))
    assert seconds_left(now_and_then, state, 1.0) == pytest.approx(500 + 2 * 5 * 5 + 2 * 5)
    assert seconds_left(now_and_then, state, 0.1) == pytest.approx(50 + 50 / 5 + 2 * 5)  # a fifth is the most
    assert seconds_left(stand_in(Budget(seconds=60)), state, 1.0) is None
