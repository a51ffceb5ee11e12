import itertools
import math
import random

import pytest

from eval.metrics import (
    bootstrap_interval,
    holm,
    majority_at_k,
    majority_vote,
    paired_test,
    pass_at_k,
    permutation_test,
    wilson_interval,
)
from mtpo.errors import InputError


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 0, 2), (4, 4, 1), (5, 2, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6), (0, 0, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(InputError):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),  # z^2 / (n + z^2) = 3.84146 / 13.84146
        (10, 10, 0.72247, 1.0),
        (
            5,
            10,
            0.23659,
            0.76341,
        ),  # 1/2 +- z sqrt(n) / 2 / sqrt(n (n + z^2)) = 1/2 +- 1.95996 / 2 / sqrt(13.84146)
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval_matches_the_formula_worked_by_hand(
    successes: int, n: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-5)


def test_wilson_ends_are_where_the_score_test_rejects() -> None:
    n, z = 1319, 1.6448536  # 90%
    for end in wilson_interval(1100, n, confidence=0.9):
        assert abs(1100 / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(z, rel=1e-6)


def test_intervals_refuse_what_has_no_meaning() -> None:
    with pytest.raises(InputError, match="between 0 and 3, got 4"):
        wilson_interval(4, 3)
    with pytest.raises(InputError, match="confidence must be between 0 and 1, got 95"):
        wilson_interval(1, 3, confidence=95)
    with pytest.raises(InputError, match="0 values"):
        bootstrap_interval([])


def test_bootstrap_interval_agrees_with_the_normal_one_on_many_values() -> None:
    rng = random.Random(0)
    values = [rng.gauss(3, 2) for _ in range(400)]
    mean = sum(values) / 400
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 400)
    low, high = bootstrap_interval(values)
    half_width = 1.96 * deviation / 20
    assert (low, high) == pytest.approx((mean - half_width, mean + half_width), abs=0.05 * half_width)
    assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)


def test_majority_vote_counts_equal_answers_and_breaks_ties_by_order() -> None:
    assert majority_vote(["1", "2", "2", None, None, None]) == "2"
    assert majority_vote(["3", "1", "1", "3", "2"]) == "3"
    assert majority_vote([None, None]) is None and majority_vote([]) is None
    answers = ["0.5", "2", "1/2", "2.0", "3/6"]
    as_numbers = {"0.5": 0.5, "1/2": 0.5, "3/6": 0.5, "2": 2, "2.0": 2}
    assert majority_vote(answers) == "0.5"
    assert majority_vote(["2", *answers], lambda x, y: as_numbers[x] == as_numbers[y]) == "2"
    assert majority_vote(answers, lambda x, y: as_numbers[x] == as_numbers[y]) == "0.5"


@pytest.mark.parametrize(
    ("answers", "k"),
    [("ccww", 4), ("ccwwx", 3), ("cwxyz-", 4), ("cccwwwxx-", 5), ("ccwwxx--", 6), ("www", 2), ("cc-", 1)],
)
def test_majority_at_k_is_the_mean_vote_over_all_subsets(answers: str, k: int) -> None:
    def chance(subset: tuple[str, ...]) -> float:
        votes = {answer: subset.count(answer) for answer in subset if answer != "-"}  # "-" has no vote
        winners = [answer for answer in votes if votes[answer] == max(votes.values())]
        return ("c" in winners) / len(winners) if winners else 0.0

    subsets = list(itertools.combinations(answers, k))
    wrong = [answers.count(answer) for answer in sorted(set(answers) - {"c", "-"})]
    expected = sum(map(chance, subsets)) / len(subsets)
    assert majority_at_k(len(answers), answers.count("c"), wrong, k) == pytest.approx(expected)


def test_majority_at_k_is_certain_where_all_agree_and_refuses_impossible_counts() -> None:
    assert majority_at_k(64, 64, [], 32) == 1.0
    assert majority_at_k(64, 0, [64], 32) == 0.0
    with pytest.raises(InputError, match="got k = 5"):
        majority_at_k(4, 2, [], 5)
    with pytest.raises(InputError, match=r"3 \+ 2 votes of 4 samples"):
        majority_at_k(4, 3, [2], 1)


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[int], list[int]]:
    return (
        [1] * both + [1] * only_a + [0] * only_b + [0] * neither,
        [1] * both + [0] * only_a + [1] * only_b + [0] * neither,
    )


@pytest.mark.parametrize(
    ("worsened", "improved", "z", "p"),
    [
        (0, 0, 0.0, 1.0),
        (1, 8, 7 / 3, 2 * (1 + 9) / 512),
        (8, 1, -7 / 3, 2 * (1 + 9) / 512),
        (0, 5, math.sqrt(5), 2 / 32),
        (2, 2, 0.0, 1.0),  # 2 (1 + 4 + 6) / 16 is more than 1
    ],
)
def test_paired_test_is_mcnemars(worsened: int, improved: int, z: float, p: float) -> None:
    result = paired_test(*outcomes(4, worsened, improved, 3))
    assert (result.worsened, result.improved) == (worsened, improved)
    assert (result.z, result.p) == pytest.approx((z, p))


def test_paired_test_approaches_the_normal_for_many_problems() -> None:
    result = paired_test(*outcomes(10, 2400, 2600, 0))
    with_continuity = math.erfc((200 - 1) / math.sqrt(5000) / math.sqrt(2))
    assert result.p == pytest.approx(with_continuity, rel=5e-3)


def test_paired_test_joins_by_problem_id() -> None:
    result = paired_test({"x": True, "y": 0, "z": 0}, {"z": False, "y": 1, "x": 1})
    assert (result.improved, result.worsened) == (1, 0)


def test_paired_test_refuses_what_is_not_paired() -> None:
    with pytest.raises(InputError, match=r"2 problems .* e\.g\. 'x'"):
        paired_test({"x": 1, "y": 1}, {"y": 1, "z": 1})
    with pytest.raises(InputError, match="got 2 and 1 outcomes"):
        paired_test([1, 0], [1])
    with pytest.raises(InputError, match="one of each"):
        paired_test([1], {"x": 1})
    with pytest.raises(InputError, match=r"0 or 1, got 1 and 0\.5"):
        paired_test([1], [0.5])
    with pytest.raises(InputError, match="at least one problem"):
        paired_test([], [])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([0.5, 0.25, 0.75, 1, 0], [1, 0.75, 0.75, 0.5, 1]),
        ([0, 1 / 3, 1, 2 / 3], [0.5, 1, 1, 0.5]),
        ([0.2, 0.2], [0.2, 0.2]),
    ],
)
def test_permutation_test_counts_all_swaps_of_the_two_results(a: list[float], b: list[float]) -> None:
    differences = [after - before for before, after in zip(a, b, strict=True)]
    swaps = list(itertools.product([1, -1], repeat=len(a)))
    sums = [sum(sign * d for sign, d in zip(signs, differences, strict=True)) for signs in swaps]
    as_large = sum(abs(s) >= abs(sum(differences)) - 1e-12 for s in sums)
    assert permutation_test(a, b) == pytest.approx(as_large / len(swaps))


@pytest.mark.parametrize(("worsened", "improved"), [(0, 0), (1, 8), (40, 70), (2, 2)])
def test_permutation_test_of_single_outcomes_is_mcnemars(worsened: int, improved: int) -> None:
    a, b = outcomes(4, worsened, improved, 3)
    assert permutation_test(a, b) == pytest.approx(paired_test(a, b).p, rel=1e-9)


def test_permutation_test_approaches_the_normal_for_many_samples() -> None:
    rng = random.Random(1)
    a = [rng.randint(0, 15) / 15 for _ in range(600)]
    b = [rng.randint(1, 16) / 16 for _ in range(600)]
    differences = [after - before for before, after in zip(a, b, strict=True)]
    z = sum(differences) / math.sqrt(sum(d * d for d in differences))
    assert permutation_test(a, b) == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=0.02)
    with pytest.raises(InputError, match=r"between 0 and 1, got 1\.5"):
        permutation_test([1.5], [1])


def test_holm_multiplies_the_smallest_p_by_the_number_of_tests_and_keeps_the_order() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])  # 3 * 0.01, 2 * 0.03, then no less
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
