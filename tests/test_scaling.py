"""The simulation of many machines, held to cases that can be worked out."""

import pytest

from benchmarks.scaling import Rates, main, simulate

ENGINE_ALONE = Rates(tokens_per_s=1000, tokens_per_s_alone=50, in_flight=64, driver_ms=1e-6, tool_ms=1e-6)


def test_a_full_engine_gives_all_its_tokens() -> None:
    forecast = simulate(ENGINE_ALONE, machines=1, trajectories=2000)
    assert forecast.tokens / forecast.seconds == pytest.approx(1000, rel=0.03)  # less at the very end
    assert forecast.engine_load == pytest.approx(1, abs=0.03)


def test_an_engine_with_few_turns_gives_each_what_it_gives_one_alone() -> None:
    rates = Rates(tokens_per_s=1000, tokens_per_s_alone=50, in_flight=5, driver_ms=1e-6, tool_ms=1e-6)
    forecast = simulate(rates, machines=1, trajectories=500)
    assert forecast.tokens / forecast.seconds == pytest.approx(5 * 50, rel=0.03)


def test_twice_the_machines_take_half_the_time() -> None:
    one, two = (simulate(ENGINE_ALONE, machines=m, trajectories=4000) for m in (1, 2))
    assert one.tokens == pytest.approx(two.tokens, rel=0.02)
    assert one.seconds / two.seconds == pytest.approx(2, rel=0.04)


def test_a_driver_bounds_the_turns_of_all_machines_and_two_drivers_bound_them_at_twice_as_many() -> None:
    rates = Rates(tokens_per_s=1e6, tokens_per_s_alone=1e5, in_flight=64, driver_ms=2.0, tool_ms=1e-6)
    one, two = (simulate(rates, machines=4, trajectories=4000, drivers=d) for d in (1, 2))
    turns_per_s = one.tokens / 150 / one.seconds  # 150 tokens a turn
    assert turns_per_s == pytest.approx(1e3 / 2.0, rel=0.03)
    assert one.driver_load == pytest.approx(1, abs=0.02)
    assert one.seconds / two.seconds == pytest.approx(2, rel=0.06)


def test_the_cores_of_a_sandbox_bound_the_calls() -> None:
    rates = Rates(
        tokens_per_s=1e6, tokens_per_s_alone=1e5, in_flight=64, cores=2, driver_ms=1e-6, tool_ms=100.0
    )
    forecast = simulate(rates, machines=1, trajectories=500)
    assert forecast.sandbox_load == pytest.approx(1, abs=0.03)
    # 2.5 calls a trajectory of 3.5 turns, 0.1 s each, on two cores
    assert forecast.seconds == pytest.approx(500 * 2.5 * 0.1 / 2, rel=0.06)


def test_the_table_has_a_line_for_each_number_of_machines(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--tokens_per_s", "10000", "--trajectories", "200", "--machines", "1", "3", "--price", "2.5"]
    assert main(argv) == 0
    header, first, second = capsys.readouterr().out.splitlines()[1:]
    assert header.split()[-1] == "cost"
    assert [line.split()[0] for line in (first, second)] == ["1", "3"]
