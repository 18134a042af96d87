from __future__ import annotations

import pytest

from tests.benchmarks.timing import Stopwatch, quantile, timing_of


def test_the_best_batch_counts_and_the_spread_says_how_far_the_worst_is_off() -> None:
    wall = [[4000, 2000, 6000], [9000, 8000, 6000]]
    timing = timing_of(wall, wall)
    assert (timing.p50_us, timing.spread, timing.num_samples) == (4.0, 1.0, 6)


def test_a_batch_counts_by_the_lesser_of_its_wall_and_cpu_medians() -> None:
    """The first was interrupted, the second is so short that reading the CPU clock shows."""
    assert timing_of([[9000] * 3], [[5000] * 3]).p50_us == 5.0
    assert timing_of([[500] * 3], [[900] * 3]).p50_us == 0.5


def test_one_interruption_in_a_hundred_is_seen_in_p99_and_not_in_p50() -> None:
    samples = [[1000.0] * 97 + [50_000.0] * 3]
    timing = timing_of(samples, samples)
    assert (timing.p50_us, timing.p99_us) == (1.0, 50.0)


@pytest.mark.parametrize(
    ("q", "expected"), [(0.0, 1.0), (0.5, 5.0), (0.9, 9.0), (0.99, 10.0), (1.0, 10.0)]
)
def test_a_quantile_is_one_of_the_values(q: float, expected: float) -> None:
    assert quantile([float(n) for n in range(10, 0, -1)], q) == expected


def test_a_stopwatch_gives_back_the_result_and_takes_a_sample_each_call() -> None:
    watch = Stopwatch()
    for _ in range(2):  # what comes before the first batch is one as well
        assert [watch.time(divmod, n, 3) for n in range(5)] == [divmod(n, 3) for n in range(5)]
        watch.batch()
        watch.batch()  # an empty batch is none
    timing = watch.timing()
    assert timing.num_samples == 10
    assert 0 < timing.p50_us <= timing.p99_us


def test_what_waits_for_others_is_not_measured_by_this_threads_cpu_time() -> None:
    idle, waits = Stopwatch(), Stopwatch(waits=True)
    for watch in (idle, waits):
        for wall, cpu in ((8_000_000, 1_000_000),) * 3:
            watch._wall.append(wall)
            watch._cpu.append(cpu)
    assert idle.timing().p50_us < 1001 < 7000 < waits.timing().p50_us
