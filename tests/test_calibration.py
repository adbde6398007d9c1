"""Calibration against closed forms: on Gaussian data every step of the probability-flow ODE is a known factor."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers import DDPMScheduler as BuiltInDDPMScheduler
from torch import Tensor

from ddpm_pipeline import DDPMScheduler, fidelity
from ddpm_pipeline import calibration as c
from ddpm_pipeline.calibrated import Guidance, Table
from ddpm_pipeline.classifier import Classifier, ClassifierNetwork
from ddpm_pipeline.features import Extractor
from ddpm_pipeline.pixels import to_pixels
from ddpm_pipeline.solver_tables import (
    END,
    dpm_solver_table,
    leading_times,
    plateau,
    solver_tables,
    trailing_times,
    with_epsilon_scales,
    with_noise,
    with_optimal_variance,
)
from training.calibration.moments import Moments, octaves

VARIANCES = (0.05, 0.3, 0.8, 1.6)  # of the pixels, one for each column of the images


def alone(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


class Gaussian:
    """x_0-prediction of pixels from N(0, v), in closed form, which counts its calls."""

    def __init__(self, scheduler: DDPMScheduler, variances: tuple[float, ...] = VARIANCES) -> None:
        self.scheduler, self.variances, self.num_calls = scheduler, torch.tensor(variances), 0

    def __call__(self, x_t: Tensor, t: int) -> Tensor:
        self.num_calls += 1
        alpha_bar = self.alpha_bar(t)
        return alpha_bar.sqrt() * self.variances / self.variance_of(t) * x_t

    def alpha_bar(self, t: int) -> Tensor:
        return torch.tensor(1.0) if t == END else self.scheduler.alphas_cumprod[t]

    def variance_of(self, t: int) -> Tensor:
        return self.alpha_bar(t) * self.variances + 1 - self.alpha_bar(t)

    def posterior_variance(self, t: int) -> Tensor:
        """Of x_0 around its prediction."""
        return self.variances * (1 - self.alpha_bar(t)) / self.variance_of(t)

    def solution(self, x_t: Tensor, t: int, end: int) -> Tensor:
        """The probability-flow ODE from t to `end`: the standard deviation changes, and nothing else."""
        return x_t * (self.variance_of(end) / self.variance_of(t)).sqrt()


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(prediction_type="sample", clip_sample=False)


def noise(number: int, seed: int = 0) -> Tensor:
    return torch.randn(number, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def exact_run(data: Gaussian, times: list[int], x_t: Tensor) -> c.Run:
    """A teacher without an error."""
    states = [data.solution(x_t, times[0], t) for t in [*times, END]]
    return c.Run(dpm_solver_table(data.scheduler, times), states, [data(x, t) for x, t in zip(states, times)])


def trial(data: Gaussian, table: Table, x_t: Tensor) -> c.Trial:
    sampler = c.Sampler(data, data.scheduler)
    target = data.solution(x_t, table.timesteps[0], END)
    return c.Trial(sampler, sampler.run(table, x_t), c.TeacherObjective(target, alone))


def test_two_unknowns_for_two_variances_are_those_of_the_closed_form(scheduler: DDPMScheduler) -> None:
    """A step of two numbers can be exact for two variances: c_x + c_0 a(v) = factor(v)."""
    data, times = Gaussian(scheduler, (0.1, 1.5)), [999, 500, 100]
    x_t = torch.randn(64, 1, 4, 2, generator=torch.Generator().manual_seed(0))
    table = c.fit_steps(c.Sampler(data, scheduler), exact_run(data, times, x_t), times, alone)
    one = torch.ones(1, 1, 1, 2)
    factors, of_prediction = data.solution(one, 999, 500).flatten(), data(one, 999).flatten()
    expected = torch.linalg.solve(torch.stack([torch.ones(2), of_prediction], dim=1).double(), factors.double())
    assert table.coefficients[0] == pytest.approx(expected.tolist(), rel=0.02, abs=0.02)  # the ridge


def test_each_part_of_the_fit_comes_nearer_to_the_exact_solution(scheduler: DDPMScheduler) -> None:
    data = Gaussian(scheduler)
    x_t, times = noise(64), trailing_times(scheduler)
    teacher = exact_run(data, times, x_t)
    even = dpm_solver_table(scheduler, trailing_times(scheduler, 4), 3)
    chosen = c.best_times(teacher, scheduler, 4, alone)
    table = c.fit_steps(c.Sampler(data, scheduler), teacher, chosen, alone)
    first, held_out = trial(data, table, x_t), trial(data, table, noise(32, seed=1))
    errors = [trial(data, even, x_t).value(), trial(data, dpm_solver_table(scheduler, chosen, 3), x_t).value()]
    errors.append(first.value())
    late = [999, 429, 249, 109]  # where least squares has more to gain than from a free first timestep on
    of_least_squares = trial(data, c.fit_steps(c.Sampler(data, scheduler), teacher, late, alone), x_t).value()
    of_solver = trial(data, dpm_solver_table(scheduler, late, 3), x_t).value()
    for make_parameters in (c.smooth_changes, c.all_numbers):
        better, better_held_out = c.improve(first, held_out, make_parameters, 8)
        assert better.value() < 0.3 * first.value()
        assert better_held_out.value() == pytest.approx(better.value(), rel=0.5)
        assert better.run.table == better_held_out.run.table
    assert errors[0] > 3 * errors[1] > 6 * errors[2]
    assert of_solver > 3 * of_least_squares


def test_iterations_that_do_not_help_on_other_noises_are_not_kept(scheduler: DDPMScheduler) -> None:
    data = Gaussian(scheduler)
    table = dpm_solver_table(scheduler, trailing_times(scheduler, 4))
    first, held_out = trial(data, table, noise(8)), trial(data, table, noise(8, seed=1))
    perfect = held_out._replace(objective=c.TeacherObjective(held_out.run.images, alone))
    assert c.improve(first, perfect, c.all_numbers, 3) == (first, perfect)


def test_a_network_that_sees_nothing_of_its_input_has_nothing_to_fit(scheduler: DDPMScheduler) -> None:
    table = dpm_solver_table(scheduler, trailing_times(scheduler, 4))
    table = table._replace(coefficients=[[0.0, 1.0] for _ in table.timesteps])
    sampler = c.Sampler(lambda x_t, t: torch.zeros_like(x_t), scheduler)
    start = c.Trial(sampler, sampler.run(table, noise(8)), c.TeacherObjective(torch.ones(8, 1, 4, 4), alone))
    assert c.gauss_newton(start, c.smooth_changes(table, scheduler)) == (start, 0.0)


def test_processes_find_the_same_numbers_as_one() -> None:
    """The sums of two halves are those of the whole."""
    inputs, target = [noise(8, seed) for seed in range(3)], noise(8, seed=3)
    sums: list[Tensor] = []

    def remembered(tensor: Tensor) -> Tensor:
        sums.append(tensor)
        return tensor

    prior, ridge = [1.0, 0.0, 0.0], 0.01
    whole = c.least_squares(inputs, target, prior, ridge, alone)
    first, second = ([each.chunk(2)[half] for each in (*inputs, target)] for half in (0, 1))
    c.least_squares(first[:3], first[3], prior, ridge, remembered)
    together = c.least_squares(second[:3], second[3], prior, ridge, lambda tensor: tensor + sums[0])
    assert together == pytest.approx(whole, rel=1e-9)
    objective = c.TeacherObjective(first[3], lambda tensor: 2 * tensor)
    residuals = objective.residuals(first[0])
    mean_square = (first[0] - first[3]).square().mean().item()
    assert objective.total(residuals @ residuals).item() == pytest.approx(mean_square)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_shortest_path_is_that_of_trying_all(num_steps: int) -> None:
    generator = torch.Generator().manual_seed(num_steps)
    cost = torch.rand(7, 8, generator=generator, dtype=torch.float64)
    cost = cost.masked_fill(torch.ones_like(cost).tril().bool(), float("inf"))
    start = torch.rand(7, generator=generator, dtype=torch.float64)

    def total(path: tuple[int, ...]) -> float:
        return start[path[0]].item() + sum(cost[i, j].item() for i, j in zip(path, [*path[1:], 7]))

    best = min(itertools.combinations(range(7), num_steps), key=total)
    assert c.shortest_path(cost, start, num_steps) == list(best)


def test_least_squares_finds_the_numbers_and_a_ridge_draws_them_to_the_prior() -> None:
    inputs = [noise(8, seed) for seed in range(3)]
    target = 0.5 * inputs[0] - 2 * inputs[1] + 0.25 * inputs[2]
    assert c.least_squares(inputs, target, [0, 0, 0], 0, alone) == pytest.approx([0.5, -2, 0.25], abs=1e-6)
    assert c.least_squares([0 * noise(8)], target, [1.5], c.RIDGE, alone) == [1.5]  # where nothing can be fitted
    assert c.least_squares(inputs, target, [1, 1, 1], 1e9, alone) == pytest.approx([1, 1, 1], abs=1e-6)


def test_a_changed_table_is_run_from_its_first_change_on(scheduler: DDPMScheduler) -> None:
    data, table = Gaussian(scheduler), dpm_solver_table(scheduler, [999, 700, 500, 300, 100], 3)
    sampler = c.Sampler(data, scheduler)
    run = sampler.run(table, noise(4))
    for step in range(5):
        rows = [list(row) for row in table.coefficients]
        rows[step][-1] += 0.1
        times = list(table.network_timesteps)
        times[step] -= 20
        for changed, calls in (
            (table._replace(coefficients=rows), 4 - step),
            (table._replace(network_timesteps=times), 5 - step),
        ):
            before = data.num_calls
            again = sampler.rerun(run, changed)
            assert data.num_calls - before == calls
            assert torch.equal(again.images, sampler.run(changed, noise(4)).images)
    assert torch.equal(sampler.rerun(run, table).images, run.images)


def test_parameters_of_zero_change_nothing_and_others_what_they_say(scheduler: DDPMScheduler) -> None:
    table = dpm_solver_table(scheduler, [999, 700, 500, 300, 100], 3)
    for make_parameters in (c.all_numbers, c.smooth_changes, c.smooth_changes_and_noise):
        parameters = make_parameters(table, scheduler)
        assert parameters.build([0.0] * len(parameters.differences)) == table
        negative = table._replace(coefficients=[[-row[0], *row[1:]] for row in table.coefficients])
        assert make_parameters(negative, scheduler).build([0.0] * len(parameters.differences)) == negative
        for k, difference in enumerate(parameters.differences):
            values = [0.0] * len(parameters.differences)
            values[k] = difference
            changed = parameters.build(values)
            assert changed != table and changed.timesteps == table.timesteps
    scaled = c.smooth_changes(table, scheduler).build([0.0] * 4 + [0.1] * 4 + [-0.5] * 4 + [0.0] * 4)
    for row, before in zip(scaled.coefficients, table.coefficients):
        assert row == pytest.approx([1.1 * before[0], *(0.5 * number for number in before[1:])])


def test_fresh_noise_replaces_as_much_of_the_old_one_and_keeps_the_image(scheduler: DDPMScheduler) -> None:
    table = dpm_solver_table(scheduler, [999, 700, 500, 300, 100], 3)
    noisy = c.smooth_changes_and_noise(table, scheduler).build([0.0] * 16 + [0.3] * 4)
    again = c.smooth_changes_and_noise(noisy, scheduler).build([0.0] * 16 + [-0.3] * 4)
    alpha_bar = scheduler.alphas_cumprod.double()[table.timesteps]
    for i, (row, before) in enumerate(zip(noisy.coefficients[:-1], table.coefficients)):
        fresh = 0.3 * (1 - alpha_bar[i + 1])
        assert noisy.noise[i] ** 2 == pytest.approx(fresh.item())
        assert (row[0] ** 2 * (1 - alpha_bar[i]) + fresh).item() == pytest.approx(
            (before[0] ** 2 * (1 - alpha_bar[i])).item()
        )
        image = [each[0] * alpha_bar[i].sqrt().item() + sum(each[1:]) for each in (row, before)]
        assert image[0] == pytest.approx(image[1])
        assert again.coefficients[i] == pytest.approx(before)
    assert noisy.noise[-1] == 0 and max(again.noise, default=0) < 1e-6


def test_runs_with_noise_have_the_same_noise(scheduler: DDPMScheduler) -> None:
    """So that a difference between two tables is not one of their noises."""
    generator = torch.Generator().manual_seed(5)
    sampler = c.Sampler(Gaussian(scheduler), scheduler, lambda: torch.randn(4, 1, 4, 4, generator=generator))
    table = with_noise(dpm_solver_table(scheduler, trailing_times(scheduler, 4), 1), scheduler, [1.0] * 4)
    run = sampler.run(table, noise(4))
    assert max(table.noise) > 0.1 and table.noise[-1] == 0
    assert torch.equal(sampler.run(table, noise(4)).images, run.images)
    quiet = table._replace(noise=(0.0, *table.noise[1:]))
    assert torch.equal(sampler.rerun(run, quiet).images, sampler.run(quiet, noise(4)).images)
    assert not torch.equal(sampler.rerun(run, quiet).images, run.images)


def test_a_table_of_the_first_order_with_noise_is_ddpm(scheduler: DDPMScheduler) -> None:
    x_t, x_0 = noise(2), noise(2, seed=1)
    for spaced, spacing in ((trailing_times, "trailing"), (leading_times, "leading")):
        table = with_noise(dpm_solver_table(scheduler, spaced(scheduler, 5), 1), scheduler, [1.0] * 5)
        ddpm = BuiltInDDPMScheduler.from_config(scheduler.config, timestep_spacing=spacing)
        ddpm.set_timesteps(5)
        assert ddpm.timesteps.tolist() == table.timesteps
        for row, deviation, t in zip(table.coefficients, table.noise, table.timesteps):
            expected = ddpm.step(x_0, t, x_t, generator=torch.Generator().manual_seed(3)).prev_sample
            fresh = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(3))
            ours = c.next_state(row, x_t, [x_0]) + deviation * fresh
            torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3)  # its variance is at least 1e-20


# ---- Solvers as tables, and the errors of the network ----------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_table_of_the_first_order_with_some_noise_is_ddim(scheduler: DDPMScheduler, eta: float) -> None:
    table = with_noise(dpm_solver_table(scheduler, trailing_times(scheduler, 5), 1), scheduler, [eta] * 5)
    ddim = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
    ddim.set_timesteps(5)
    x_t, x_0, fresh = noise(2), noise(2, seed=1), noise(2, seed=2)
    for row, deviation, t in zip(table.coefficients, table.noise or [0.0] * 5, table.timesteps):
        expected = ddim.step(x_0, t, x_t, eta=eta, variance_noise=fresh if eta else None).prev_sample
        torch.testing.assert_close(c.next_state(row, x_t, [x_0]) + deviation * fresh, expected, rtol=0, atol=1e-5)


def test_the_plateau_is_noise_in_the_middle_of_the_process_alone(scheduler: DDPMScheduler) -> None:
    table = dpm_solver_table(scheduler, [999, 801, 800, 500, 200, 199], 1)
    noisy = with_noise(table, scheduler, plateau(table, scheduler))
    everywhere = with_noise(table, scheduler, [1.0] * 6)
    assert [deviation > 0 for deviation in noisy.noise] == [False, False, True, True, True, False]
    for deviation, row, quiet, other in zip(
        noisy.noise, noisy.coefficients, table.coefficients, everywhere.coefficients
    ):
        assert row == (other if deviation else quiet)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_optimal_variance_few_steps_keep_the_variance_of_the_data(scheduler: DDPMScheduler, eta: float) -> None:
    """Pixels of one variance are Gaussian around x_0_pred, with the variance V_t: so each step is exact."""
    data, x_t = Gaussian(scheduler, (0.3,)), noise(4096)[..., :1]
    generator = torch.Generator().manual_seed(7)
    sampler = c.Sampler(data, scheduler, lambda: torch.randn(x_t.shape, generator=generator))
    times = [999, 600, 250]
    table = with_noise(dpm_solver_table(scheduler, times, 1), scheduler, [eta] * 3)
    better = with_optimal_variance(table, [data.posterior_variance(t).item() for t in times])
    for t, state in zip(times, sampler.run(better, x_t).states):
        assert state.var().item() == pytest.approx(data.variance_of(t).item(), rel=0.03)
    assert sampler.run(table, x_t).states[-2].var().item() < 0.9 * data.variance_of(times[-1]).item()


def test_epsilon_scaling_divides_the_predicted_noise(scheduler: DDPMScheduler) -> None:
    times, scales = trailing_times(scheduler, 4), [1.0, 1.02, 1.05, 0.98]
    table = with_epsilon_scales(dpm_solver_table(scheduler, times, 1), scheduler, scales)
    options = {"timestep_spacing": "trailing", "prediction_type": "epsilon", "set_alpha_to_one": True}
    ddim = DDIMScheduler.from_config(scheduler.config, **options)
    ddim.set_timesteps(4)
    x_t, epsilon = noise(2), noise(2, seed=1)
    for row, t, scale in zip(table.coefficients, times, scales):
        alpha_bar = scheduler.alphas_cumprod[t]
        x_0 = (x_t - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
        expected = ddim.step(epsilon / scale, t, x_t).prev_sample
        torch.testing.assert_close(c.next_state(row, x_t, [x_0]), expected, rtol=1e-4, atol=1e-4)


def test_pure_noise_has_no_predicted_noise_to_divide() -> None:
    zero_snr = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    table = dpm_solver_table(zero_snr, trailing_times(zero_snr, 4))
    scaled = with_epsilon_scales(table, zero_snr, [1.1] * 4)
    assert scaled.coefficients[0] == list(table.coefficients[0]) and scaled.coefficients[1] != table.coefficients[1]


def test_errors_of_an_exact_network_are_those_of_the_closed_form(scheduler: DDPMScheduler) -> None:
    data, times = Gaussian(scheduler), [999, 600, 250, 50]
    images, x_t = noise(2048) * data.variances.sqrt(), noise(2048, seed=1) * data.variance_of(999).sqrt()
    generator = torch.Generator().manual_seed(3)
    sampler = c.Sampler(data, scheduler, lambda: torch.randn(images.shape, generator=generator))
    run = exact_run(data, times, x_t)
    found = c.network_errors(run, sampler, images, alone)
    expected = [data.posterior_variance(t).mean().item() for t in times]
    assert found.x_0_variances == pytest.approx(expected, rel=0.03)
    assert found.epsilon_scales == pytest.approx([1.0] * 4, rel=0.02)
    louder = [[1.1 * each for each in tensors] for tensors in (run.states, run.predictions)]
    of_louder = c.network_errors(c.Run(run.table, *louder), sampler, images, alone)
    assert of_louder.epsilon_scales == pytest.approx([1.1 * scale for scale in found.epsilon_scales])
    assert of_louder.x_0_variances == found.x_0_variances
    twice = c.network_errors(run, sampler, images, lambda tensor: 2 * tensor)  # two processes with the same images
    assert twice == found


class Variances:
    """The sum of squared errors of the variances of the pixels."""

    def __init__(self, data: Gaussian) -> None:
        self.data = data

    def residuals(self, images: Tensor) -> Tensor:
        return (images.var(dim=(0, 1, 2)) - self.data.variances).double()

    def total(self, products: Tensor) -> Tensor:
        return products


def test_the_best_solver_is_corrected_where_that_helps(scheduler: DDPMScheduler) -> None:
    data, x_t = Gaussian(scheduler), noise(1024)
    generator = torch.Generator().manual_seed(3)
    sampler = c.Sampler(data, scheduler, lambda: torch.randn(x_t.shape, generator=generator))
    spacings = [trailing_times(scheduler, 4), leading_times(scheduler, 4)]
    tables = [each._replace(guidance=Guidance(autoguidance_scale=2)) for each in solver_tables(scheduler, spacings)]
    assert len(tables) == len({str(table) for table in tables}) == 15  # the plateau has all steps that start at 750
    start = c.Trial(sampler, sampler.run(tables[0], x_t), Variances(data))
    least = min(start.of(table).value() for table in tables)

    def found(x_0_variance: float, scale: float, few: c.Trial = start) -> c.Trial:
        return c.best_solver(few, start, spacings, lambda run: c.NetworkErrors([x_0_variance] * 4, [scale] * 4))

    best = found(0.0, 1.0)
    assert best.run.table in tables and best.value() == least
    assert found(0.0, 0.99).value() < least or found(0.0, 1.01).value() < least
    assert found(0.02, 1.0).value() < least
    assert found(9.0, 0.1).run.table == best.run.table

    class Others(Variances):
        def residuals(self, images: Tensor) -> Tensor:
            return 1 / super().residuals(images).norm(keepdim=True)

    on_few = found(0.0, 1.0, start._replace(objective=Others(data)))  # which keeps the worst of all
    kept = sorted((start.of(table).value() for table in tables), reverse=True)[: c.KEPT_SOLVERS]
    assert on_few.value() == min(kept) > least


# ---- Moments ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth random images, (600, 1, 16, 16) uint8."""
    field = torch.randn(600, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(field, scale_factor=2, mode="bilinear")
    return to_pixels((smooth / 2).clamp(-1, 1), np.dtype(np.uint8))


def test_the_sum_of_squares_is_the_frechet_distance_of_near_images(images: np.ndarray) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ClassifierNetwork(1, 4).eval()  # any one does
    moments = Moments(images, [Classifier(network, np.arange(4), "4 rotations", 0.0, 1.0, "")], [], alone)
    x = torch.from_numpy(images).float() / 127.5 - 1
    features = torch.cat(
        [(kind - p.mean) @ p.components for kind, p in zip(moments._kinds(x), moments._projections)], dim=1
    )
    same = moments.residuals(x)
    assert (same @ same).item() == pytest.approx(0, abs=1e-6)
    for change in (0.98 * x, x + 0.01, x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))):
        residuals = moments.residuals(change)
        changed = torch.cat(
            [(kind - p.mean) @ p.components for kind, p in zip(moments._kinds(change), moments._projections)], dim=1
        )
        expected = fidelity.frechet_distance(changed, features)
        assert (residuals @ residuals).item() == pytest.approx(expected, rel=0.3)


def test_further_features_count_beside_the_others(images: np.ndarray) -> None:
    """What the others do not see: a change of the corners alone, which they hold for the same images."""

    def corners(x: Tensor) -> Tensor:
        return x[:, 0, ::15, ::15].flatten(1)

    features = Extractor("corners", "", corners)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ClassifierNetwork(1, 4).eval()
    classifier = Classifier(network, np.arange(4), "4 rotations", 0.0, 1.0, "")
    x = torch.from_numpy(images).float() / 127.5 - 1
    changed = x.clone()
    changed[:, :, ::15, ::15] = 0.5 * x[:, :, ::15, ::15]
    sums = []
    for more in ([], [features]):
        residuals = Moments(images, [classifier], more, alone).residuals(changed)
        sums.append((residuals @ residuals).item())
    assert sums[1] > 3 * sums[0]


def test_octaves_of_a_checkerboard_are_the_finest(images: np.ndarray) -> None:
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    mean, *details = octaves(0.5 * board.expand(1, 1, 16, 16))[0].tolist()
    assert mean == 0
    assert details[0] == pytest.approx(np.log(0.5), abs=1e-4)
    assert all(detail == pytest.approx(np.log(1e-6) / 2) for detail in details[1:])


def test_few_noises_are_enough_to_differentiate_with(scheduler: DDPMScheduler) -> None:
    """A quarter of the noises, and others: the variances at the end are as near to those of the data."""
    table = dpm_solver_table(scheduler, trailing_times(scheduler, 4))

    def found(number: int | None) -> tuple[float, int]:
        data, images = Gaussian(scheduler), 0

        def counted(x_t: Tensor, t: int) -> Tensor:
            nonlocal images
            images += len(x_t)
            return data(x_t, t)

        sampler = c.Sampler(counted, scheduler)

        def trial(size: int, seed: int) -> c.Trial:
            return c.Trial(sampler, sampler.run(table, noise(size, seed)), Variances(data))

        few = None if number is None else trial(number, seed=2)
        first, held_out = trial(8192, seed=0), trial(8192, seed=1)
        before, images = held_out.value(), 0
        better, better_held_out = c.improve(first, held_out, c.smooth_changes, 3, few=few)
        assert better.value() < 0.05 * first.value()
        return better_held_out.value() / before, images

    (of_all, images_of_all), (of_few, images_of_few) = found(None), found(2048)
    assert max(of_all, of_few) < 0.02
    assert images_of_few < 0.6 * images_of_all
