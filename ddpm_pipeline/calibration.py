"""CALIBRATION: fits the numbers of a calibrated sampler, a table of calibrated.py, to one network.

The teacher is DPM-Solver++ 2M with many steps. A sampler of N steps should draw the same images from the same noise:

1. Timesteps: the path of N steps through the teacher's timesteps with the least sum of single-step errors, by dynamic
   programming (Chen et al. 2024, arXiv 2405.11326).
2. Coefficients: step by step, the least-squares combination of x_t and the last predictions of x_0 that comes nearest
   to the teacher's next state (as Duan et al. 2023, arXiv 2305.14677, do with all earlier ones).
3. The error at the end: all numbers together, the network's timesteps included, by the Gauss-Newton method
   (Levenberg-Marquardt). A table has so few numbers that finite differences do: the network needs no gradients.

The third part minimizes any sum of squares of what is drawn (`Objective`), for instance the difference between
moments of samples and of training images, which corrects errors of the network that the teacher has as well. Then
there is another beginning, too: the best of many solvers as they are (solver_tables.py), by the same sum of squares.
With many steps it is the only one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .calibrated import Table, next_state
from .denoiser import Denoiser
from .scheduling_ddpm import DDPMScheduler
from .solver_tables import (
    END,
    dpm_solver_coefficients,
    history,
    refreshed,
    solver_tables,
    with_epsilon_scales,
    with_optimal_variance,
)

RIDGE = 1e-3  # of a step's least squares, towards DPM-Solver++
DAMPING = 0.1  # of the first iteration, relative to the diagonal
MAX_TRIES = 4  # dampings tried in an iteration, each ten times the one before
LEAST_GAIN = 0.01  # an iteration that gains less is the last
MAX_MOVE = 10.0  # of a number in one iteration, in finite differences
ALL_FREE = 10  # up to so many steps every number of a table is free; else it changes smoothly over the steps
KNOTS = 4  # of the smooth changes
KEPT_SOLVERS = 6

Total = Callable[[Tensor], Tensor]  # the sum of a tensor over all processes


# ---- Sampling runs ---------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A sampling run, with what is needed to run a changed table from the first change on.

    Args:
        states: x_t at the start of each of N steps, and the images at the end; N + 1 times (B, C, H, W).
        predictions: x_0_pred of each step.
    """

    table: Table
    states: list[Tensor]
    predictions: list[Tensor]

    @property
    def images(self) -> Tensor:
        return self.states[-1]


class Sampler:
    """Runs tables with a network.

    Args:
        denoiser: for all images of a run.
        scheduler: what the network predicts, noise schedule and clipping.
        draw: draws the noise of a step, (B, C, H, W); each step has the same noise in all runs.
    """

    def __init__(self, denoiser: Denoiser, scheduler: DDPMScheduler, draw: Callable[[], Tensor] | None = None) -> None:
        self.denoiser, self.scheduler = denoiser, scheduler
        self._draw, self._noises = draw, list[Tensor]()

    def noise(self, i: int) -> Tensor:
        """The noise of step i."""
        assert self._draw is not None
        while len(self._noises) <= i:
            self._noises.append(self._draw())
        return self._noises[i]

    @torch.no_grad()
    def predict(self, x_t: Tensor, t: int) -> Tensor:
        """x_0_pred, (B, C, H, W)."""
        output = self.denoiser(x_t, t)[:, : x_t.shape[1]]  # without a learned variance
        return self.scheduler.predict_x_0(output, t, x_t)

    def run(self, table: Table, x_t: Tensor) -> Run:
        """A run from pure noise."""
        return self._run(table, [x_t], [])

    def rerun(self, run: Run, table: Table) -> Run:
        """A run from the same noise with a changed table; steps before the first change are not computed again."""
        first = 0
        while first < len(table.timesteps) and _step(table, first) == _step(run.table, first):
            first += 1
        same_prediction = table.network_timesteps[first:][:1] == run.table.network_timesteps[first:][:1]
        return self._run(table, run.states[: first + 1], run.predictions[: first + same_prediction])

    def _run(self, table: Table, states: list[Tensor], predictions: list[Tensor]) -> Run:
        states, predictions = list(states), list(predictions)
        for i in range(len(states) - 1, len(table.timesteps)):
            if i == len(predictions):
                predictions.append(self.predict(states[i], table.network_timesteps[i]))
            states.append(next_state(table.coefficients[i], states[i], history(predictions, i)))
            if table.noise and table.noise[i]:
                states[-1].add_(self.noise(i), alpha=table.noise[i])
            if i + 1 == len(table.timesteps):
                states[-1] = self.scheduler.bounded(states[-1], in_place=True)
        return Run(table, states, predictions)


def _step(table: Table, i: int) -> tuple[int, list[float], float]:
    return table.network_timesteps[i], table.coefficients[i], table.noise[i] if table.noise else 0.0


# ---- 1. Timesteps ----------------------------------------------------------------------------------------------------


def best_times(teacher: Run, scheduler: DDPMScheduler, num_steps: int, total: Total) -> list[int]:
    """The N timesteps, out of the teacher's M, with the least sum of errors of single DDIM steps between its states.

    The first one is free: the error of pure noise as the state of a later timestep counts as that of a step.
    """
    times = [*teacher.table.timesteps, END]
    squares = torch.full((len(times) - 1, len(times)), math.inf, dtype=torch.float64)
    for i, prediction in enumerate(teacher.predictions):
        for j in range(i + 1, len(times)):
            row = dpm_solver_coefficients(scheduler, [times[i]], times[j])
            error = next_state(row, teacher.states[i], [prediction]) - teacher.states[j]
            squares[i, j] = error.square().mean().item()
    starts = torch.tensor([(x_t - teacher.states[0]).double().square().mean() for x_t in teacher.states[:-1]])
    path = shortest_path(total(squares).sqrt(), total(starts).sqrt(), num_steps)
    return [times[i] for i in path]


def shortest_path(cost: Tensor, start: Tensor, num_steps: int) -> list[int]:
    """The nodes that N steps to node M start at, with the least sum of costs.

    Args:
        cost: (M, M + 1), of a step from node i to node j; infinite unless j > i.
        start: (M,), of beginning at each node.
    """
    last = cost.shape[1] - 1
    best = torch.cat([start, start.new_tensor([math.inf])])  # cost of the way to each node
    came_from = []
    for _ in range(num_steps):
        best, before = (best[:last, None] + cost).min(dim=0)
        came_from.append(before.tolist())
    path = [last]
    for before in reversed(came_from):
        path.append(before[path[-1]])
    return path[:0:-1]


# ---- 2. Coefficients, step by step -----------------------------------------------------------------------------------


def fit_steps(sampler: Sampler, teacher: Run, timesteps: list[int], total: Total) -> Table:
    """Fit the coefficients of each step to the teacher's next state, from where the steps before have led to.

    Args:
        timesteps: some of the teacher's, descending, from its first one.
    """
    ends = [*timesteps[1:], END]
    x_t, predictions, coefficients = teacher.states[0], [], []
    for i, (t, end) in enumerate(zip(timesteps, ends)):
        predictions.append(sampler.predict(x_t, t))
        inputs = [x_t, *history(predictions, i)]
        target = teacher.images if end == END else teacher.states[teacher.table.timesteps.index(end)]
        prior = dpm_solver_coefficients(sampler.scheduler, history(timesteps, i), end)
        coefficients.append(least_squares(inputs, target, prior, RIDGE, total))
        x_t = next_state(coefficients[-1], x_t, inputs[1:])
    return Table(timesteps, list(timesteps), coefficients, teacher.table.guidance)


def least_squares(
    inputs: Sequence[Tensor], target: Tensor, prior: Sequence[float], ridge: float, total: Total
) -> list[float]:
    """c that minimizes |sum_k c_k inputs_k - target|^2 + ridge sum_k |inputs_k|^2 (c_k - prior_k)^2."""
    z = torch.stack([each.flatten() for each in inputs]).cpu().double()
    products = total(torch.cat([z @ z.T, (z @ target.flatten().cpu().double())[:, None]], dim=1))
    gram, right = products[:, :-1], products[:, -1]
    penalty = (ridge * gram.diagonal()).clamp(min=1e-12)  # also if an input is zero everywhere
    solution: Tensor = torch.linalg.solve(
        gram + penalty.diag(), right + penalty * torch.tensor(prior, dtype=torch.float64)
    )
    return solution.tolist()


# ---- 3. The error at the end -----------------------------------------------------------------------------------------


class Objective(Protocol):
    """A sum of squares of numbers that depend on the images at the end."""

    def residuals(self, images: Tensor) -> Tensor:
        """(R,) float64 on the CPU, for the images (B, C, H, W) of this process."""

    def total(self, products: Tensor) -> Tensor:
        """The sum over all processes of products of residuals; what it is given if each has all residuals."""


class TeacherObjective:
    """The mean squared difference from the teacher's images.

    Args:
        target: (B, C, H, W), of this process.
    """

    def __init__(self, target: Tensor, total: Total) -> None:
        self._target, self._sum = target, total
        self._number = total(torch.tensor([target.numel()], dtype=torch.float64)).item()

    def residuals(self, images: Tensor) -> Tensor:
        return (images - self._target).flatten().cpu().double() / math.sqrt(self._number)

    def total(self, products: Tensor) -> Tensor:
        return self._sum(products)


class Parameters(NamedTuple):
    """Numbers that change a table; zeros leave it as it is.

    Args:
        build: the table with these changes.
        differences: a small change of each, for finite differences.
    """

    build: Callable[[Sequence[float]], Table]
    differences: list[float]


MakeParameters = Callable[[Table, DDPMScheduler], Parameters]


def all_numbers(table: Table, scheduler: DDPMScheduler) -> Parameters:
    """Every coefficient, and every timestep of the network, rounded."""
    sizes, num_train_timesteps = [len(row) for row in table.coefficients], scheduler.num_steps

    def build(values: Sequence[float]) -> Table:
        values = list(values)
        moved = [values.pop(0) for _ in sizes]
        rows = [[number + values.pop(0) for number in row] for row in table.coefficients]
        return _moved(table, moved, rows, num_train_timesteps)

    return Parameters(build, _time_differences(table.network_timesteps, num_train_timesteps) + [0.02] * sum(sizes))


def smooth_changes(table: Table, scheduler: DDPMScheduler) -> Parameters:
    """Four changes that are piecewise linear over the steps, with KNOTS values each.

    The network's timesteps, a factor for x_t, one for the predictions of x_0, and how far these are extrapolated: what
    is added to the coefficient of the newest one and taken from that of the one before.
    """
    return _smooth(table, scheduler, 4)


def smooth_changes_and_noise(table: Table, scheduler: DDPMScheduler) -> Parameters:
    """A fifth one: the share of the variance of the noise in the next state that is drawn anew, as by eta in DDIM."""
    return _smooth(table, scheduler, 5)


def _smooth(table: Table, scheduler: DDPMScheduler, number: int) -> Parameters:
    num_steps = len(table.timesteps)
    knots = min(KNOTS, num_steps)
    position = torch.linspace(0, knots - 1, num_steps, dtype=torch.float64)
    hats = (1 - (position[:, None] - torch.arange(knots)).abs()).clamp(min=0)  # (N, knots)
    alpha_bar = scheduler.alpha_bars(torch.tensor(table.timesteps))[0].double().tolist()
    before = table.noise or (0.0,) * num_steps

    def build(values: Sequence[float]) -> Table:
        values = [*values, *[0.0] * knots] if number == 4 else values
        moved, factor_x_t, factor_x_0, extra, fresh = (
            (hats @ torch.tensor(part, dtype=torch.float64)).tolist() for part in _chunks(values, knots)
        )
        rows, noise = [], []
        for i, (coef_x_t, *coefs) in enumerate(table.coefficients):
            row = [coef_x_t * (1 + factor_x_t[i]), *(coef * (1 + factor_x_0[i]) for coef in coefs)]
            if len(coefs) > 1:
                row[1] += extra[i]
                row[2] -= extra[i]
            variance = 0.0 if i + 1 == num_steps else 1 - alpha_bar[i + 1]  # of the noise in the next state
            deviation = max(0.0, before[i] ** 2 + fresh[i] * variance) ** 0.5
            rows.append(refreshed(row, deviation**2 - before[i] ** 2, alpha_bar[i]))
            noise.append(deviation)
        return _moved(table, moved, rows, scheduler.num_steps)._replace(noise=tuple(noise) if any(noise) else ())

    at_knots = [table.network_timesteps[round(k * (num_steps - 1) / max(1, knots - 1))] for k in range(knots)]
    differences = [0.02] * (2 * knots) + [0.05] * ((number - 3) * knots)
    return Parameters(build, _time_differences(at_knots, scheduler.num_steps) + differences)


def _chunks(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _time_differences(timesteps: Sequence[int], num_train_timesteps: int) -> list[float]:
    """A hundredth of the process, at least 1, away from its end."""
    size = max(1, num_train_timesteps // 100)
    return [float(size if t + size < num_train_timesteps else -size) for t in timesteps]


def _moved(table: Table, moved: Sequence[float], rows: list[list[float]], num_train_timesteps: int) -> Table:
    network_timesteps = [
        min(num_train_timesteps - 1, max(0, round(t + change))) for t, change in zip(table.network_timesteps, moved)
    ]
    return table._replace(network_timesteps=network_timesteps, coefficients=rows)


class Trial(NamedTuple):
    """Noises that a table is judged on: a run from them, and what is to be small."""

    sampler: Sampler
    run: Run
    objective: Objective

    def of(self, table: Table) -> Trial:
        return self._replace(run=self.sampler.rerun(self.run, table))

    def residuals(self) -> Tensor:
        return self.objective.residuals(self.run.images)

    def value(self) -> float:
        """The sum of squares."""
        residuals = self.residuals()
        return self.objective.total(residuals @ residuals).item()


def gauss_newton(
    trial: Trial, parameters: Parameters, damping: float = DAMPING, few: Trial | None = None
) -> tuple[Trial, float]:
    """One iteration: the changed trial, and the share by which its sum of squares is smaller; else `trial`, and 0.

    Args:
        parameters: that change the table of the trial.
        damping: added to the normal equations, relative to their diagonal; ten times as much after each failure.
        few: a trial of the same table and with the same residuals, but with fewer noises, to differentiate with:
            changed images come from the same noises, so their differences vary far less than the residuals.
    """
    number, residuals, rows = len(parameters.differences), trial.residuals(), []
    few, start = (trial, residuals) if few is None else (few, few.residuals())
    for k, difference in enumerate(parameters.differences):
        values = [0.0] * number
        values[k] = difference
        rows.append((few.of(parameters.build(values)).residuals() - start) / difference)
    jacobian = torch.stack([*rows, residuals])
    products = trial.objective.total(jacobian @ jacobian.T)
    gram, gradient, before = products[:-1, :-1], products[:-1, -1], products[-1, -1].item()
    if not gram.any():  # whatever is changed, the images are the same
        return trial, 0.0
    diagonal = gram.diagonal() + 1e-12 * gram.diagonal().max()
    most = MAX_MOVE * torch.tensor(parameters.differences, dtype=torch.float64).abs()
    for _ in range(MAX_TRIES):
        move = -torch.linalg.solve(gram + damping * diagonal.diag(), gradient)
        changed = trial.of(parameters.build(move.clamp(-most, most).tolist()))
        after = changed.value()
        if after < before:
            return changed, 1 - after / before
        damping *= 10
    return trial, 0.0


def improve(
    trial: Trial,
    held_out: Trial,
    make_parameters: MakeParameters,
    max_iterations: int,
    least_damping: float = 0.0,
    few: Trial | None = None,
) -> tuple[Trial, Trial]:
    """Gauss-Newton iterations, as long as they help on other noises, too.

    Args:
        trial, held_out: of the same table.
        make_parameters: all_numbers, smooth_changes or smooth_changes_and_noise.
        least_damping: the first iteration has DAMPING, each later one a tenth of the one before, but not less.
        few: see gauss_newton; of any table with this number of steps.
    Returns:
        Both trials, of the best table.
    """
    damping, value = DAMPING, held_out.value()
    for _ in range(max_iterations):
        parameters = make_parameters(trial.run.table, trial.sampler.scheduler)
        few = None if few is None else few.of(trial.run.table)
        changed, gain = gauss_newton(trial, parameters, damping, few)
        judged = held_out.of(changed.run.table)
        if not (judged_value := judged.value()) < value:
            break
        trial, held_out, value = changed, judged, judged_value
        damping = max(damping / 10, least_damping)
        if gain < LEAST_GAIN:
            break
    return trial, held_out


# ---- Solvers as they are, with the errors of the network in mind -----------------------------------------------------


class NetworkErrors(NamedTuple):
    """What a network gets wrong at each step of a run.

    x_0_variances: V_t = E |x_0 - x_0_pred|^2 / d, on images that noise was added to.
    epsilon_scales: how many times as large its prediction of the noise is on its own samples, root mean square.
    """

    x_0_variances: list[float]
    epsilon_scales: list[float]


def network_errors(run: Run, sampler: Sampler, images: Tensor, total: Total) -> NetworkErrors:
    """Errors at the steps of a run, on images that the network was not trained on.

    Args:
        sampler: for the images, (B, C, H, W); it draws the noise that is added to them.
    """
    table, scheduler = run.table, sampler.scheduler
    variances, scales = [], []
    for i, (t, of_network) in enumerate(zip(table.timesteps, table.network_timesteps)):
        alpha_bar = scheduler.alpha_bars(torch.tensor([t]))[0].item()
        x_t = math.sqrt(alpha_bar) * images + math.sqrt(1 - alpha_bar) * sampler.noise(i)
        x_0_pred = sampler.predict(x_t, of_network)
        pairs = (x_t, x_0_pred), (run.states[i], run.predictions[i])
        noises = [x - math.sqrt(alpha_bar) * x_0 for x, x_0 in pairs]  # predicted, but for the same factor
        sums = [[each.double().square().sum().item(), each.numel()] for each in (images - x_0_pred, *noises)]
        squares, numbers = total(torch.tensor(sums, dtype=torch.float64)).unbind(dim=1)
        error, of_images, of_samples = (squares / numbers).tolist()
        variances.append(error)
        scales.append(math.sqrt(of_samples / of_images) if of_images and of_samples else 1.0)
    return NetworkErrors(variances, scales)


def best_solver(
    few: Trial, trial: Trial, spacings: Sequence[Sequence[int]], errors: Callable[[Run], NetworkErrors]
) -> Trial:
    """The best of `solver_tables`, changed by what `errors` finds of it where that helps.

    Args:
        few: with few noises, on which all of them are tried; the best KEPT_SOLVERS go to `trial`.
        trial: of any table with this number of steps and the guidance of the sampler.
    """
    scheduler, guidance = trial.sampler.scheduler, trial.run.table.guidance
    tables = [table._replace(guidance=guidance) for table in solver_tables(scheduler, spacings)]
    kept = sorted(tables, key=lambda table: few.of(table).value())[:KEPT_SOLVERS]
    best = min(map(trial.of, kept), key=Trial.value)
    found = errors(best.run)
    for change in (
        lambda table: with_optimal_variance(table, found.x_0_variances),
        lambda table: with_epsilon_scales(table, scheduler, found.epsilon_scales),
    ):
        best = min(best, trial.of(change(best.run.table)), key=Trial.value)
    return best
