"""Progress bars: on a terminal those of tqdm, elsewhere a line a minute."""

import io

import pytest

from training import progress as progress_module
from training.progress import INTERVAL, Lines, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def run(monkeypatch):
    """A function that advances a bar, one step in so many seconds of a clock that the test moves: what it prints."""

    def printed(stream, *, steps, seconds, **options):
        clock = [1000.0]
        monkeypatch.setattr(progress_module.sys, "stderr", stream)
        monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
        with progress(desc="training", **options) as bar:
            for step in range(steps):
                clock[0] += seconds
                bar.update()
                bar.set_postfix(loss=f"{step}")
        return stream.getvalue()

    return printed


def test_a_log_gets_a_line_a_minute_and_one_at_the_end(run):
    text = run(io.StringIO(), steps=250, seconds=1, total=250, initial=0)
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines] == ["training"] * 5  # 60, 120, 180, 240 and 250 seconds
    assert "60/250it, 24%" in lines[0] and "04:10<00:00" in lines[-1] and "loss=249" in lines[-1]
    assert "\r" not in text and "\x1b" not in text and "" not in lines and text.endswith("\n")


@pytest.mark.parametrize(("steps", "seconds", "lines"), [(50, 1, 0), (3, 100, 4), (7000, 0.01, 2), (0, 1, 0)])
def test_no_log_has_more_lines_than_minutes(run, steps, seconds, lines):
    text = run(io.StringIO(), steps=steps, seconds=seconds)
    assert len(text.splitlines()) == lines <= steps * seconds / INTERVAL + 1


def test_bars_within_bars_and_disabled_ones_leave_nothing_in_a_log(capsys):
    for _ in progress(range(3), "outer"):
        for _ in progress(range(3), "inner", unit=" images", leave=False):
            pass
    bar = progress(total=2, disable=True)
    bar.update()
    bar.set_description("hidden")
    bar.close()
    assert isinstance(bar, Lines) and bar.n == 0
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(run):
    assert "\rtraining: 100%|" in run(Terminal(), steps=5, seconds=1, total=5)


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_the_time_left_can_be_set(monkeypatch, stream):
    monkeypatch.setattr(progress_module.sys, "stderr", output := stream())
    bar = progress(desc="training", total=100)
    bar.update(10)
    bar.seconds_left = 754.0
    assert "<12:34, " in str(bar) and "10/100" in str(bar) and "{" not in str(bar)
    bar.close()
    assert "training" in output.getvalue() or stream is io.StringIO
