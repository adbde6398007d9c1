"""CALIBRATION: the numbers of a table of `calibrated.py`, fitted to a network by a few minutes of sampling.

The teacher is DPM-Solver++ 2M with many steps. It samples from some noises, and a sampler with few steps should pass
through the same states. Its numbers are found without gradients of the network:

1. Timesteps: the path of N steps through the teacher's timesteps with the least sum of single-step errors, by dynamic
   programming (Chen et al. 2024, arXiv 2405.11326).
2. Coefficients: step by step, the least-squares combination of x_t and the last predictions of x_0 that comes nearest
   to the teacher's next state, from where the steps before have led to (a relative of Duan et al. 2023, arXiv
   2306.XXXXX).
3. Search: one timestep after the other is moved as long as the error at the end falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .calibrated import HISTORY, CalibratedScheduler, Table
from .denoiser import Denoiser
from .scheduling_ddpm import DDPMScheduler

TEACHER_STEPS = 100
END = -1  # the timestep of the image


# ---- Coefficients of DPM-Solver++ ------------------------------------------------------------------------------------


def dpm_solver_table(scheduler: DDPMScheduler, timesteps: Sequence[int], order: int = 2) -> Table:
    """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), multistep, data prediction, of order 1, 2 or 3 as a table."""
    ends = [*timesteps[1:], END]
    rows = [
        dpm_solver_coefficients(scheduler, list(timesteps[max(0, i - order + 1) : i + 1])[::-1], end)
        for i, end in enumerate(ends)
    ]
    return Table(list(timesteps), list(timesteps), rows)


def dpm_solver_coefficients(scheduler: DDPMScheduler, times: Sequence[int], end: int) -> list[float]:
    """Coefficients of x_t and of the predictions at `times` in the step from times[0] to `end`; order len(times)."""
    alpha_bar = scheduler.alpha_bars(torch.tensor([t for t in times]))[0]
    if end == END:
        return [0.0, 1.0] + [0.0] * (len(times) - 1)
    alpha_bar_end = scheduler.alpha_bars(torch.tensor([end]))[0]
    lam = (alpha_bar / (1 - alpha_bar)).log() / 2
    lam_end = ((alpha_bar_end / (1 - alpha_bar_end)).log() / 2).item()
    h = lam_end - lam[0].item()
    signal, noise = math.sqrt(alpha_bar_end.item()), math.sqrt(1 - alpha_bar_end.item())
    c_x = noise / math.sqrt(1 - alpha_bar[0].item())
    phi_1 = signal * -math.expm1(-h)  # of D_0
    if len(times) == 1:
        return [c_x, phi_1]
    r_0 = (lam[0] - lam[1]).item() / h
    if len(times) == 2:
        half = phi_1 / 2 / r_0
        return [c_x, phi_1 + half, -half]
    r_1 = (lam[1] - lam[2]).item() / h
    phi_2 = signal * (math.expm1(-h) / h + 1)
    phi_3 = -signal * ((math.expm1(-h) + h) / h**2 - 0.5)
    # D1_0 = (m0 - m1) / r0, D1_1 = (m1 - m2) / r1, D1 = D1_0 + r0 / (r0 + r1) (D1_0 - D1_1), D2 = (D1_0 - D1_1) / (r0 + r1)
    d1_0, d1_1 = (1 / r_0, -1 / r_0, 0.0), (0.0, 1 / r_1, -1 / r_1)
    share = r_0 / (r_0 + r_1)
    row = [phi_1, 0.0, 0.0]
    for k in range(3):
        difference = d1_0[k] - d1_1[k]
        row[k] += phi_2 * (d1_0[k] + share * difference) + phi_3 * difference / (r_0 + r_1)
    return [c_x, *row]


# ---- Teacher ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Teacher:
    """The teacher's trajectories of B noises: states (M + 1, B, C, H, W) at `times` and at the end, x_0_pred (M, ...)."""

    times: list[int]
    states: Tensor
    predictions: Tensor

    def state(self, t: int) -> Tensor:
        return self.states[-1] if t == END else self.states[self.times.index(t)]


def spaced(number: int, num_steps: int) -> list[int]:
    """`number` descending timesteps from the last one on."""
    return [round(num_steps * (number - i) / number) - 1 for i in range(number)]


@torch.no_grad()
def sample(denoiser: Denoiser, scheduler: DDPMScheduler, table: Table, x: Tensor, start: int = 0, history=()) -> list[tuple[Tensor, Tensor]]:
    """(x_t, x_0_pred) of each step of a table, and at the end (x_0, x_0)."""
    sampler = CalibratedScheduler(scheduler, table)
    sampler._history = list(history)
    steps = []
    for t, network_t in list(zip(table.timesteps, table.network_timesteps))[start:]:
        output = sampler.step(denoiser(x, network_t), t, x)
        steps.append((x, output.pred_original_sample))
        x = output.prev_sample
    return [*steps, (x, x)]


def teach(denoiser: Denoiser, scheduler: DDPMScheduler, noise: Tensor, num_steps: int = TEACHER_STEPS) -> Teacher:
    times = spaced(min(num_steps, scheduler.num_steps), scheduler.num_steps)
    steps = sample(denoiser, scheduler, dpm_solver_table(scheduler, times), noise)
    return Teacher(times, torch.stack([x for x, _ in steps]), torch.stack([p for _, p in steps[:-1]]))


# ---- Timesteps -------------------------------------------------------------------------------------------------------


def shortest_path(cost: Tensor, num_steps: int) -> list[int]:
    """Indices of N steps from 0 to M with the least sum of costs; cost is (M, M + 1), of a step from i to j > i."""
    last = cost.shape[1] - 1
    best = torch.full((num_steps + 1, last + 1), math.inf, dtype=torch.float64)
    best[0, 0] = 0
    came_from = torch.zeros((num_steps + 1, last + 1), dtype=torch.int64)
    upper = torch.ones_like(cost, dtype=torch.bool).triu(1)
    cost = cost.double().masked_fill(~upper, math.inf)
    for n in range(1, num_steps + 1):
        best[n], came_from[n] = (best[n - 1, :last, None] + cost).min(0)
    path = [last]
    for n in range(num_steps, 0, -1):
        path.append(int(came_from[n, path[-1]]))
    return path[::-1][:-1]


def step_costs(teacher: Teacher, scheduler: DDPMScheduler) -> Tensor:
    """(M, M + 1): the root mean squared error of one DDIM step from the teacher's state at i to its state at j."""
    times = [*teacher.times, END]
    cost = torch.zeros(len(times) - 1, len(times))
    for i in range(len(times) - 1):
        for j in range(i + 1, len(times)):
            c_x, c_0 = dpm_solver_coefficients(scheduler, [times[i]], times[j])
            error = c_x * teacher.states[i] + c_0 * teacher.predictions[i] - teacher.states[j]
            cost[i, j] = error.square().mean().sqrt()
    return cost


# ---- Coefficients ----------------------------------------------------------------------------------------------------


def least_squares(inputs: Sequence[Tensor], target: Tensor, prior: Sequence[float], ridge: float) -> list[float]:
    """c that minimizes |sum_k c_k inputs_k - target|^2 + ridge sum_k |inputs_k|^2 (c_k - prior_k)^2."""
    z = torch.stack([each.flatten() for each in inputs]).double()
    gram = z @ z.T
    penalty = ridge * gram.diagonal()
    right = z @ target.flatten().double() + penalty * torch.tensor(prior, dtype=torch.float64)
    return torch.linalg.solve(gram + penalty.diag(), right).tolist()


class Fit:
    """Fits the coefficients of a sampler to the teacher, step by step from where the steps before have led to."""

    def __init__(self, denoiser: Denoiser, scheduler: DDPMScheduler, teacher: Teacher, *, ridge: float = 1e-3, uses=HISTORY) -> None:
        self.denoiser, self.scheduler, self.teacher = denoiser, scheduler, teacher
        self.ridge, self.uses = ridge, uses
        self.calls = 0

    @torch.no_grad()
    def step(self, x: Tensor, history: list[Tensor], times: list[int], i: int, network_t: int):
        """One fitted step: (x_prev, history, coefficients, squared error)."""
        t, end = times[i], times[i + 1] if i + 1 < len(times) else END
        output = self.denoiser(x, network_t)
        self.calls += 1
        prediction = self.scheduler.predict_x_0(output, network_t, x)
        history = [prediction, *history[: self.uses - 1]]
        before = times[max(0, i - len(history) + 1) : i + 1][::-1]
        prior = dpm_solver_coefficients(self.scheduler, before, end)
        target = self.teacher.state(end)
        row = least_squares([x, *history], target, prior, self.ridge)
        x_prev = sum(c * each for c, each in zip(row, [x, *history]))
        return x_prev, history, row, (x_prev - target).square().mean().item()

    def run(self, times: list[int], network_times: list[int] | None = None, prefix=None):
        """Table and states [(x, history)] at the start of each step; error at the end."""
        network_times = network_times or times
        states = prefix[0] if prefix else [(self.teacher.states[0], [])]
        rows = prefix[1] if prefix else []
        states, rows = list(states), list(rows)
        errors = []
        for i in range(len(rows), len(times)):
            x, history = states[-1]
            x, history, row, error = self.step(x, history, times, i, network_times[i])
            states.append((x, history))
            rows.append(row)
            errors.append(error)
        return Table(list(times), list(network_times), rows), states, errors[-1]
