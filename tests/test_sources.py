import pytest

from eval.predictions import is_equivalent, predictions_of
from eval.sources import Sources, compare_flags, match_problems, readme
from mtpo.errors import InputError
from mtpo.grader import grade
from mtpo.trajectory import Problem, Segment, StopReason, Trajectory


def trajectory(problem_id: str, sample: int, text: str = "") -> Trajectory:
    segments = (Segment("prompt", (1,)), Segment("action", (5,), text=text))
    return Trajectory(problem_id, sample, segments, StopReason.ANSWERED)


@pytest.mark.parametrize(
    ("gold", "answer", "flag", "kind"),
    [
        (r"\frac{3}{7}", "0.4286", True, "rounding of the gold answer"),
        (r"3\sqrt{2}", r"x \approx 4.24", True, "rounding of the gold answer"),
        (r"-\frac{1}{3}", "-0.33", True, "rounding of the gold answer"),
        ("80", "81", True, "within 5 % of the gold answer"),
        ("4", "3.999999", True, "within 5 % of the gold answer"),
        (r"\frac{1}{13}", r"\frac{14}{169}", True, "another answer"),
        (r"\frac{3}{7}", "0.5286", True, "another answer"),
        ("-5", "-5", False, "the gold answer"),
        ("0.5", r"\frac12", False, "equal to the gold answer"),
        ("7", None, True, "no answer"),
    ],
)
def test_a_disagreement_is_told_by_its_kind(gold: str, answer: str | None, flag: bool, kind: str) -> None:
    text = "none" if answer is None else rf"\boxed{{{answer}}}"
    predictions = predictions_of([(trajectory("p", 0, text), grade(text, gold))], [Problem("p", "?", gold)])
    report = compare_flags(predictions, {("p", 0): {"correct": flag}}, is_equivalent)["correct"]
    [found] = report.disagreements
    assert (found.kind, found.flag, found.verdict) == (kind, flag, "wrong" if flag else "correct")
    assert report.by_kind == [{"flag": flag, "verdict": found.verdict, "kind": kind, "count": 1}]
    assert (report.agreement.count, report.agreement.of) == (0, 1)


def test_flags_are_found_by_name_also_in_lists_and_may_be_missing() -> None:
    graded = [(trajectory("p", s, "\\boxed{1}"), grade("\\boxed{1}", "1")) for s in range(3)]
    predictions = predictions_of(graded, [Problem("p", "?", "1")])
    records = {("p", s): {"report": [True, False], "sample": s, "mine": True} for s in range(3)}
    found = compare_flags(predictions, records, is_equivalent)
    assert list(found) == ["report"]  # `mine` is no usual name
    assert (found["report"].agreement.count, found["report"].agreement.of, found["report"].missing) == (
        1,
        2,
        1,
    )
    assert compare_flags(predictions, records, is_equivalent, ["mine"])["mine"].agreement.value == 1
    with pytest.raises(InputError, match="--flags theirs: no record has such a field"):
        compare_flags(predictions, records, is_equivalent, ["theirs"])


def test_outputs_are_matched_to_a_set_by_id_or_by_question_and_the_others_left_out() -> None:
    problems = [Problem("gsm8k:test/0", "How many?", "1"), Problem("gsm8k:test/1", "What is $2^2$?", "4")]
    own = [
        Problem("gsm8k:test/0", "Answer in a box. How many? Think.", ""),
        Problem("gsm8k:test/1", "How much?", ""),  # another set's index
        Problem("file/7", "what is  $2^{2}$ ?", ""),
        Problem("file/8", "Who?", ""),
    ]
    named = [trajectory("file/7", 0), trajectory("gsm8k:test/0", 0), trajectory("file/8", 0)]
    named += [trajectory("file/7", 1), trajectory("gsm8k:test/0", 5), trajectory("gsm8k:test/1", 0)]
    found = [(t.problem_id, t.sample) for t in match_problems(named, own, problems)]
    assert found == [(f"gsm8k:test/{i}", s) for i, s in [(1, 0), (0, 0), (1, 1), (0, 1)]]


def test_readme_says_what_was_scored_and_where_the_source_is_wrong() -> None:
    texts = [f"\\boxed{{0.{i}}}" for i in range(1, 8)]
    graded = [(trajectory("p", s, text), grade(text, "9")) for s, text in enumerate(texts)]
    predictions = predictions_of(graded, [Problem("p", "?", "9")])
    flags = compare_flags(predictions, {("p", s): {"correct": True} for s in range(7)}, is_equivalent)
    text = readme(Sources("out.jsonl", 10, 1, 2, flags), "TABLE", "math500", {"paper_tolerance": False})
    assert "7 of 10 trajectories were scored; 1 could not be imported, 2 are on other problems" in text
    assert "gold answers: math500" in text and "`paper_tolerance` = False" in text and "TABLE" in text
    assert "0.0%  0 of 7 flagged trajectories" in text
    assert "- 7 flagged right, here wrong: another answer" in text
    assert text.count("answer `0.") == 5 and "and 2 more, all in `metrics.json`" in text
