"""What people read while they wait."""

import pytest

from raydistill.stages import progress
from raydistill.stages.progress import Progress, duration, per_second, size


def test_counts_say_rate_and_time_left_from_the_first_line_on(monkeypatch: pytest.MonkeyPatch):
    clock, lines = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = Progress(lines.append, every_seconds=5)
    for now, done in [(10.0, 40), (12.0, 100), (20.0, 60), (30.0, 400)]:
        clock[0] = now
        shown.counts("teach", done, 400, "rows", started=0.0, facts="loss 1")
    assert lines == [
        "teach: 40 of 400 rows, 4 rows/s with its start, at most 1 min 30 s left, loss 1",  # 40 rows in 10 s
        "teach: 60 of 400 rows, 2 rows/s, 2 min 50 s left, loss 1",  # 20 in the 10 s since that line
        "teach: 400 of 400 rows, 18 rows/s, loss 1",
    ]


@pytest.mark.parametrize(("rate", "text"), [(0.25, "0.25"), (1.44, "1.4"), (9.96, "10"), (12.4, "12"), (1234, "1,234")])
def test_slow_rates_have_two_digits(rate: float, text: str):
    assert per_second(rate) == text


def test_seconds_and_bytes_are_written_as_people_read_them():
    assert [duration(s) for s in (0.4, 59.4, 59.6, 200, 3599.6, 7500)] == [
        "0 s", "59 s", "1 min 00 s", "3 min 20 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip
    assert [size(b) for b in (12, 999, 1500, 2.5e6, 3e9, 4e15)] == [
        "12 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "3 GB",
        "4 PB",
    ]
