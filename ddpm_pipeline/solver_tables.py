"""SOLVERS AS TABLES: DPM-Solver++ and its stochastic variants, as the numbers of each step (see calibrated.py).

A calibration starts from them. Each is right for a network without errors; two changes take account of those that a
network has, and both are again tables:

- optimal variance (Bao et al. 2022, arXiv 2201.06503): x_0_pred is a mean, and the image is spread around it by the
  variance V_t. A step that uses it as if it were the image leaves out this variance, and noise makes up for it.
- epsilon scaling (Ning et al. 2023, arXiv 2308.15321): on its own samples a network predicts more noise than on images
  that noise was added to, since its errors pile up. So the prediction is divided by how much more it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .calibrated import HISTORY, Table
from .scheduling_ddpm import DDPMScheduler

END = -1  # the timestep of the images
TEACHER_STEPS = 100
PLATEAU = 0.2, 0.8  # of the process: SA-Solver (Xue et al. 2023, arXiv 2309.05019), with the default of diffusers


def history(of_steps: Sequence[Any], i: int, length: int = HISTORY) -> list[Any]:
    """What step i may use of its own step and those before, as predictions or timesteps, the newest first."""
    return list(of_steps[max(0, i - length + 1) : i + 1][::-1])


# ---- Timesteps -------------------------------------------------------------------------------------------------------


def trailing_times(scheduler: DDPMScheduler, num_steps: int = TEACHER_STEPS) -> list[int]:
    """Evenly spaced timesteps, descending, the last of the process first; all of them if there are fewer."""
    longest = scheduler.num_steps
    number = min(num_steps, longest)
    return [round(longest * (number - i) / number) - 1 for i in range(number)]


def leading_times(scheduler: DDPMScheduler, num_steps: int) -> list[int]:
    """Evenly spaced timesteps, descending, down to the first of the process."""
    stride = scheduler.num_steps // num_steps
    return [i * stride for i in range(num_steps)][::-1]


# ---- DPM-Solver++ ----------------------------------------------------------------------------------------------------


def dpm_solver_table(scheduler: DDPMScheduler, timesteps: Sequence[int], order: int = 2) -> Table:
    """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), multistep, with data prediction, of order 1 (DDIM), 2 or 3."""
    ends = [*timesteps[1:], END]
    coefficients = [dpm_solver_coefficients(scheduler, history(timesteps, i, order), end) for i, end in enumerate(ends)]
    return Table(list(timesteps), list(timesteps), coefficients)


def dpm_solver_coefficients(scheduler: DDPMScheduler, times: Sequence[int], end: int) -> list[float]:
    """Coefficients of x_t and of the predictions at `times` in the step from times[0] to `end`, of order len(times).

    Args:
        times: the newest first, at most three.
        end: END for the step to the image, which is the newest prediction.
    """
    if end == END:
        return [0.0, 1.0] + [0.0] * (len(times) - 1)
    alpha_bar = scheduler.alpha_bars(torch.tensor([*times, end]))[0].double()
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    lam = (signal / noise).log().tolist()  # half the log SNR
    h = lam[-1] - lam[0]
    coef_x_t, signal_end = (noise[-1] / noise[0]).item(), signal[-1].item()
    phi_1 = signal_end * -math.expm1(-h)
    if len(times) == 1:
        return [coef_x_t, phi_1]
    r_0 = (lam[0] - lam[1]) / h
    if len(times) == 2:
        return [coef_x_t, phi_1 + phi_1 / (2 * r_0), -phi_1 / (2 * r_0)]
    r_1 = (lam[1] - lam[2]) / h
    phi_2 = signal_end * (math.expm1(-h) / h + 1)
    phi_3 = signal_end * (0.5 - (math.expm1(-h) + h) / h**2)
    # first and second differences of the predictions, as rows of their coefficients
    newer = torch.tensor([1, -1, 0], dtype=torch.float64) / r_0
    older = torch.tensor([0, 1, -1], dtype=torch.float64) / r_1
    second = (newer - older) / (r_0 + r_1)
    row = phi_2 * (newer + r_0 * second) + phi_3 * second
    row[0] += phi_1
    return [coef_x_t, *row.tolist()]


# ---- Noise -----------------------------------------------------------------------------------------------------------


def with_noise(table: Table, scheduler: DDPMScheduler, etas: Sequence[float]) -> Table:
    """A deterministic table with eta times the noise of DDPM in each step, as in DDIM (Song et al. 2021, Eq. 16).

    Of the first order and with eta 1 it is DDPM with the posterior's variance (Ho et al. 2020, Eq. 7).
    """
    alpha_bar = _alpha_bars(table, scheduler)
    rows, noise = [], []
    for row, here, end, eta in zip(table.coefficients, alpha_bar, [*alpha_bar[1:], 1.0], etas):
        variance = eta**2 * (1 - end) / (1 - here) * (1 - here / end)
        rows.append(refreshed(row, variance, here))
        noise.append(math.sqrt(variance))
    return table._replace(coefficients=rows, noise=tuple(noise) if any(noise) else ())


def refreshed(row: list[float], variance: float, alpha_bar: float) -> list[float]:
    """Coefficients of a step that adds fresh noise of this variance: so much less of x_t is kept, and the image in it
    is replaced by its prediction."""
    coef_x_t, coef_x_0, *others = row
    if variance == 0:
        return row
    kept = math.copysign(math.sqrt(max(0.0, coef_x_t**2 - variance / (1 - alpha_bar))), coef_x_t)
    return [kept, coef_x_0 + (coef_x_t - kept) * math.sqrt(alpha_bar), *others]


def plateau(table: Table, scheduler: DDPMScheduler) -> list[float]:
    """Eta of each step: 1 in the middle of the process, else 0."""
    low, high = (share * scheduler.num_steps for share in PLATEAU)
    return [float(low <= t <= high) for t in table.timesteps]


def solver_tables(scheduler: DDPMScheduler, spacings: Sequence[Sequence[int]]) -> list[Table]:
    """DPM-Solver++ of each order at each of these lists of timesteps: deterministic, with the noise of DDPM, and with
    that noise in the middle of the process only."""
    tables = list[Table]()
    for table in (dpm_solver_table(scheduler, times, order) for times in spacings for order in (1, 2, 3)):
        for etas in ([0.0] * len(table.timesteps), [1.0] * len(table.timesteps), plateau(table, scheduler)):
            noisy = with_noise(table, scheduler, etas)
            tables += [noisy] if noisy not in tables else []
    return tables


# ---- Errors of the network -------------------------------------------------------------------------------------------


def with_optimal_variance(table: Table, x_0_variances: Sequence[float]) -> Table:
    """A table with as much more noise as the variance of the image around x_0_pred calls for.

    Bao et al. 2022, Eq. (8): sigma^2 + c^2 V_t, with c what a step multiplies x_0 with. Errors of the last predictions
    have the same sign, mostly, so with several of them c is the sum of their coefficients.

    Args:
        x_0_variances: V_t = E |x_0 - x_0_pred|^2 / d in each step.
    """
    noise = [
        math.sqrt(deviation**2 + sum(row[1:]) ** 2 * variance)
        for row, deviation, variance in zip(table.coefficients, _noise(table), x_0_variances)
    ]
    return table._replace(noise=(*noise[:-1], 0.0))  # the image is the last prediction


def with_epsilon_scales(table: Table, scheduler: DDPMScheduler, scales: Sequence[float]) -> Table:
    """A table for predictions of the noise that are divided by these scales, one for each step.

    Then x_0_pred, too, is a sum of x_t and itself. Earlier predictions are taken to change as much as the newest.
    """
    rows = []
    for row, alpha_bar, scale in zip(table.coefficients, _alpha_bars(table, scheduler), scales):
        if alpha_bar == 0:  # epsilon is x_t, whatever the network predicts: there is nothing to scale
            rows.append(list(row))
            continue
        coef_x_t, coef_x_0, *others = row
        moved = sum(row[1:]) * (1 - 1 / scale)
        rows.append([coef_x_t + moved / math.sqrt(alpha_bar), coef_x_0 - moved, *others])
    return table._replace(coefficients=rows)


def _noise(table: Table) -> Sequence[float]:
    return table.noise or (0.0,) * len(table.timesteps)


def _alpha_bars(table: Table, scheduler: DDPMScheduler) -> list[float]:
    """At the timesteps of a table."""
    return scheduler.alpha_bars(torch.tensor(table.timesteps))[0].double().tolist()
