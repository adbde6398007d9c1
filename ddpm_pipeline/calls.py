"""CALLS: what a pipeline knows of its calls, several at once in several threads, and the user's callback."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from torch import Tensor

from .denoiser import UNetDenoiser
from .sampling import SamplingRun, SamplingStep, StepCallback, TrajectoryStep, noising_steps, sampling_steps

Value = TypeVar("Value")


class OfThread(Generic[Value]):
    """A value of each thread: what it set itself, or, if it set none, what any thread set last."""

    def __init__(self, value: Value) -> None:
        self.last = value
        self._by_thread: dict[int, Value] = {}  # not threading.local: a pipeline can be pickled and deep-copied

    def get(self) -> Value:
        return self._by_thread.get(threading.get_ident(), self.last)

    def set(self, value: Value) -> None:
        self._by_thread[threading.get_ident()] = self.last = value


class Call:
    """One call of a pipeline."""

    def __init__(self, num_timesteps: int, guidance_scale: float = 1.0) -> None:
        self.num_timesteps, self.guidance_scale = num_timesteps, guidance_scale
        self.interrupted = False
        self.callback_thread: int | None = None  # while it is in its callback


class Calls:
    """The calls of a pipeline: those that run, and the last one of each thread."""

    def __init__(self) -> None:
        self._last, self._running = OfThread(Call(num_timesteps=0)), list[Call]()

    @property
    def last(self) -> Call:
        """The current or last call: of this thread, if it has one."""
        return self._last.get()

    def begin(self, num_timesteps: int, guidance_scale: float = 1.0) -> Call:
        call = Call(num_timesteps, guidance_scale)
        self._last.set(call)
        return call

    @contextlib.contextmanager
    def running(self, call: Call) -> Iterator[None]:
        """A context in which the call can be interrupted."""
        self._running.append(call)
        try:
            yield
        finally:
            self._running.remove(call)

    def marked(self, call: Call, callback: StepCallback) -> StepCallback:
        """The callback of a call, which knows that it is in it."""

        def marked(i: int, t: int, x_t: Tensor) -> Tensor:
            call.callback_thread = threading.get_ident()
            try:
                return callback(i, t, x_t)
            finally:
                call.callback_thread = None
                self._last.set(call)  # the callback may have called the pipeline

        return marked

    @property
    def interrupted(self) -> bool:
        return self.last.interrupted or any(call.interrupted for call in self._reached())

    def interrupt(self, value: bool) -> None:
        """In a callback its own call, elsewhere all calls that run now. Later ones are not affected."""
        for call in self._reached():
            call.interrupted = value

    def _reached(self) -> list[Call]:
        in_callback = self.last.callback_thread == threading.get_ident()
        return [self.last] if in_callback else [self.last, *self._running]


class WithCalls:
    """The calls of a pipeline: how they run, and the properties that tell of them."""

    _calls: Calls
    _inversion_errors: OfThread[Tensor | None]
    progress_bar: Callable[..., Any]  # of diffusers

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current or last sampling run: of this thread, if it has one."""
        return self._calls.last.guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current or last sampling run: of this thread, if it has one."""
        return self._calls.last.num_timesteps

    @property
    def inversion_error(self) -> Tensor | None:
        """Of the last `invert`: mean squared difference of each image and its reconstruction, (B,), in [-1, 1].

        In a thread that has called `invert` itself, of its own last one.
        """
        return self._inversion_errors.get()

    @property
    def interrupt(self) -> bool:
        """Set it to True while the pipeline runs: sampling stops after the current step, with noise still in x_t.

        A callback stops its own call; any other code stops all calls that run now. Later calls are not affected.
        """
        return self._calls.interrupted

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._calls.interrupt(value)

    _interrupt = interrupt  # diffusers' documentation has callbacks that set this one

    def _trajectory(self, run: SamplingRun, x_0: Tensor | None) -> Iterator[TrajectoryStep]:
        if x_0 is not None:
            for step in noising_steps(run.scheduler, x_0, run.step_options["generator"]):
                run = run._replace(x_t=step.x_t)
                yield step
        for step, _ in self._sampling_steps(run):
            yield step
            run.denoiser.forget_weights()

    def _sampling_steps(
        self, run: SamplingRun, callback: StepCallback | None = None, remark: str | None = None
    ) -> Iterator[SamplingStep]:
        call = self._calls.begin(len(run.scheduler.timesteps), run.denoiser.guidance_scale)
        callback = None if callback is None else self._calls.marked(call, callback)
        with self._calls.running(call), self._progress(run.denoiser, call.num_timesteps, remark):
            yield from sampling_steps(run, interrupted=lambda: call.interrupted, callback=callback)

    def _sample(self, run: SamplingRun, callback: StepCallback | None = None, remark: str | None = None) -> Tensor:
        """x_0, (B, C, H, W), or x_t where sampling was interrupted."""
        x_t = run.x_t
        for _, x_t in self._sampling_steps(run, callback, remark):  # noqa: B007
            pass
        return x_t

    @contextlib.contextmanager
    def _progress(self, denoiser: UNetDenoiser, total: int, remark: str | None = None) -> Iterator[None]:
        """A progress bar over the calls of the denoiser, with a remark behind its numbers."""
        with self.progress_bar(total=total) as bar:
            if remark is not None:
                bar.set_postfix_str(remark, refresh=False)
            denoiser.progress_bar = bar
            yield


def checked_callback(pipe: Any, callback: Any, names: Any) -> StepCallback | None:
    """The user's callback after each step as one that the loop calls; what it returns is checked.

    Args:
        callback: called with (pipe, step, t, {"latents": x_t}); returns None or a dict with other "latents".
        names: of the tensors that it gets: "latents", or none.
    """
    allowed = pipe._callback_tensor_inputs
    unknown = [name for name in names if name not in allowed] if isinstance(names, (list, tuple)) else names
    if unknown != []:
        raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown!r}: give a list from {allowed}")
    if callback is None:
        return None
    if not callable(callback):
        raise ValueError(f"callback_on_step_end is {callback!r}: give a function of (pipe, step, t, tensors)")

    def checked(i: int, t: int, x_t: Tensor) -> Tensor:
        returned = callback(pipe, i, t, dict.fromkeys(names, x_t))
        if returned is None:
            return x_t
        if not isinstance(returned, dict):
            raise ValueError(f"callback_on_step_end returned {returned!r}: give None or a dict from {allowed}")
        unknown = [name for name in returned if name not in allowed]
        if unknown:
            raise ValueError(f"callback_on_step_end returned a dict with {unknown[:5]}: give one from {allowed}")
        latents = returned.get("latents", x_t)
        if not isinstance(latents, Tensor) or not latents.is_floating_point() or latents.shape != x_t.shape:
            what = f"{latents.dtype} of shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else repr(latents)
            raise ValueError(f"callback_on_step_end returned latents {what}: give floats of shape {tuple(x_t.shape)}")
        if latents is not x_t and not latents.float().isfinite().all():
            raise ValueError("callback_on_step_end returned latents that are nan or infinite: give finite numbers")
        return latents.to(x_t)

    return checked
