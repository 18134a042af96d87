from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.benchmarks.harness import Report, Row, table


def report(*rows: Row) -> Report:
    made = Report("trial", {"seed": 1}, progress=io.StringIO())
    for row in rows:
        made.add(row)
    return made


def row(name: str, value: float, target: float | None, *, more_is_better: bool = False) -> Row:
    return Row(
        name=name, value=value, unit="us", target=target, aim=1.0, higher_is_better=more_is_better
    )


@pytest.mark.parametrize(
    ("value", "target", "more_is_better", "passed"),
    [
        (2.0, 2.0, False, True),
        (2.1, 2.0, False, False),
        (2.0, 2.0, True, True),
        (1.9, 2.0, True, False),
        (1e9, None, False, None),
        (float("nan"), 2.0, False, False),  # a figure that could not be had holds no budget
    ],
)
def test_a_row_holds_its_target_or_not(
    value: float, target: float | None, more_is_better: bool, passed: bool | None
) -> None:
    assert row("a", value, target, more_is_better=more_is_better).passed is passed


def test_a_missed_target_fails_the_run_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(row("held", 1.0, 2.0), row("over", 3.0, 2.0)).finish(tmp_path) == 1
    assert "missed: over\n" in capsys.readouterr().out


def test_a_missed_aim_or_a_row_without_a_target_does_not_fail_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(row("held", 1.5, 2.0), row("no budget", 99.0, None)).finish(tmp_path) == 0
    assert "1 targets held, 0 missed, 0 aims reached" in capsys.readouterr().out


def test_the_file_has_where_it_ran_and_every_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = report(
        Row(name="r", value=1.0, unit="x", target=2.0, details={"p50_us": 3.0, "tokens": 7})
    )
    made.extra["outputs"] = ["kept"]
    made.finish(tmp_path)
    content = json.loads((tmp_path / "trial.json").read_text())
    assert content["machine"]["cores"] >= 1 and content["versions"]["python"]
    assert content["configuration"] == {"seed": 1} and content["outputs"] == ["kept"]
    (only,) = content["results"]
    assert only["pass"] is True and only["aim_reached"] is None
    assert (only["name"], only["p50_us"], only["tokens"]) == ("r", 3.0, 7)


def test_two_rows_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two rows are named 'same'"):
        report(row("same", 1.0, None), row("same", 2.0, None))


def test_the_table_shows_value_budget_and_verdict() -> None:
    times = {"p50_us": 0.5, "p99_us": 1200.0}
    text = table(
        [
            Row(name="ratio", value=1.25, unit="x", target=1.5, aim=1.2, details=times),
            Row(name="hit rate", value=0.5, unit="", target=0.6, higher_is_better=True),
            Row(name="bytes", value=12345, unit="B", note="of one process"),
        ]
    ).splitlines()
    assert " ".join(text[1].split()) == "ratio 1.25x ≤ 1.5x ≤ 1.2x 0.5 / 1,200 pass"
    assert text[2].split() == ["hit", "rate", "0.5", "≥", "0.6", "MISS"]
    assert text[3].split() == ["bytes", "12,345", "B"]
    assert text[-1] == "bytes: of one process"
