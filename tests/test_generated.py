from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import pytest

from data.generated import KIND_WEIGHTS, Split, problem, problems, split_of, story, story_of
from mtpo.errors import InputError
from mtpo.trajectory import Problem


def branch(have: dict[str, float], said: Sequence[str]) -> float:
    base, number = have[said[1]], int(said[0])
    return base + number if base / 2 == base // 2 else base - number


# Every sentence, and how a reader who knows nothing of `Story` would work with it: (pattern, number of the person).
READINGS = [
    (r"(\w+) has (\d+) \w+", lambda have, said: int(said[1])),
    (r"\w+ has (\d+) more \w+ than (\w+)", lambda have, said: have[said[1]] + int(said[0])),
    (r"\w+ has (\d+) more \w+ than (\w+), otherwise \d+ fewer", branch),
    (r"\w+ has (\d+) fewer \w+ than (\w+)", lambda have, said: have[said[1]] - int(said[0])),
    (r"\w+ has (\d+) times as many \w+ as (\w+)", lambda have, said: have[said[1]] * int(said[0])),
    (r"Compared with \w+, that is (\d+) more \w+", lambda have, said: newest(have) - int(said[0])),
    (
        r"Compared with \w+, that is (\d+) times as many \w+",
        lambda have, said: newest(have) / int(said[0]),
    ),
    (r"Then (\w+) finds (\d+) more \w+", lambda have, said: have[said[0]] + int(said[1])),
    (r"Then (\w+) gives away (\d+) \w+", lambda have, said: have[said[0]] - int(said[1])),
    (
        r"Then (\w+) buys (\d+) bags of (\d+) \w+ each",
        lambda have, said: have[said[0]] + sum([int(said[2])] * int(said[1])),
    ),
]


def newest(have: dict[str, float]) -> float:
    return list(have.values())[-1]


def read_sentence(sentence: str, have: dict[str, float]) -> None:
    """Work out how many the person of this sentence has, and write it down."""
    sentence = re.sub(r"^If \w+ has an even number, ", "", sentence)
    for pattern, number in READINGS:
        if found := re.fullmatch(pattern, sentence):
            name = re.sub(r"Compared with |Then ", "", sentence).split()[0].rstrip(",")
            have[name] = number(have, found.groups())
            return
    raise AssertionError(f"no reading for {sentence!r}")


def solve(question: str) -> float:
    """The answer to a question, read from its English."""
    *told, asked = re.split(r"(?<=[.?]) ", question)
    have: dict[str, float] = {}
    for sentence in told:
        read_sentence(sentence.rstrip("."), have)
    if "together" in asked:
        return sum(have.values())
    if found := re.search(r"of (\w+) cost at (\d+) dollars each", asked):
        return have[found[1]] * int(found[2])
    if found := re.search(r"left when (\w+) fills boxes of (\d+)", asked):
        return divmod(have[found[1]], int(found[2]))[1]
    names = re.findall(r"[A-Z][a-z]+", asked.removeprefix("How"))
    return next(have[name] for name in names if name in have)


def test_the_gold_answer_is_what_a_reader_of_the_english_works_out() -> None:
    for told in problems("train", 3000):
        assert solve(told.question) == int(told.answer), told.question


def test_answers_are_whole_numbers_of_at_most_five_digits() -> None:
    assert all(re.fullmatch(r"\d{1,5}", told.answer) for told in problems("train", 3000))


def test_every_kind_comes_as_often_as_its_weight_says() -> None:
    counts = Counter(told.subject for told in problems("train", 3000))
    assert sum(KIND_WEIGHTS.values()) == 100
    for kind, percent in KIND_WEIGHTS.items():
        assert counts[kind] / 30 == pytest.approx(percent, abs=2.5), kind


def test_no_question_can_be_in_two_splits() -> None:
    splits: tuple[Split, ...] = ("train", "dev", "test")
    for split in splits:
        assert {split_of(told.question) for told in problems(split, 3000)} == {split}
    one_by_one = Counter(split_of(f"question {i}") for i in range(5000))
    assert one_by_one["dev"] / 5000 == pytest.approx(0.1, abs=0.02)
    assert one_by_one["test"] / 5000 == pytest.approx(0.1, abs=0.02)


def test_ranges_of_the_train_split_hardly_share_a_question() -> None:
    first, second = problems("train", 4000), problems("train", 4000, start=4000)
    shared = {told.question for told in first} & {told.question for told in second}
    assert len(shared) < 8  # one in a thousand


def test_a_problem_depends_on_its_split_and_index_alone() -> None:
    whole = problems("dev", 30)
    assert problems("dev", 10, start=20) == whole[20:]
    assert problem("dev", 25) == whole[25]
    assert whole[25].id == "generated:dev/25"


def test_a_known_problem_stays_what_it_was() -> None:
    question = (
        "Mia has 40 pens. Tom has 18 more pens than Mia. Then Tom buys 4 bags of 4 pens each. "
        "How many pens does Tom have?"
    )
    assert problem("test", 17) == Problem("generated:test/17", question, "74", subject="bags")


def test_limits_default_to_500_held_out_problems() -> None:
    assert len(problems("dev")) == len(problems("test")) == 500
    assert problems("test", 0) == []


def test_both_branches_are_taken() -> None:
    branches = [s for s in (story("train", i) for i in range(2000)) if s.kind == "branch"]
    more = [b.answer > b.values[b.steps[-2].name] for b in branches]
    assert len(branches) > 100
    assert 0.3 < sum(more) / len(more) < 0.8


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"generated:all: no such split, expected one of train, dev, test"):
        problems("all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="limit -1"):
        problems("dev", -1)


def test_a_story_is_found_for_generated_problems_only() -> None:
    assert story_of(problem("train", 3)) == story("train", 3)
    for stranger in (Problem("gsm8k:test/3", "?", "1"), Problem("generated:train/3", "another text", "1")):
        with pytest.raises(InputError, match=re.escape(stranger.id)):
            story_of(stranger)
