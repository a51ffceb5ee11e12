import json
from pathlib import Path

from data.problems import write_problems
from eval.lineage import lineage_of
from mtpo.runs import write_json
from mtpo.trajectory import Problem


def make_run(folder: Path, **options: object) -> Path:
    write_json(folder / "config.json", {"options": options})
    return folder


def make_model(folder: Path) -> Path:
    write_json(folder / "config.json", {"model_type": "gemma2"})  # no run's
    return folder


def problems(*ids: str) -> list[Problem]:
    return [Problem(i, f"What is {i}?", "1") for i in ids]


def ids(known: dict[str, list[Problem]]) -> dict[str, list[str]]:
    return {Path(file).parent.name: [p.id for p in found] for file, found in known.items()}


def test_a_trained_model_leads_to_the_problems_that_were_sampled_for_it(tmp_path: Path) -> None:
    write_problems(make_run(tmp_path / "sampled") / "problems.jsonl", problems("a", "b"))
    labels = make_run(tmp_path / "pairs", trajectories=[str(tmp_path / "sampled")])
    run = make_run(tmp_path / "dpo", model="google/gemma", data=str(labels))
    make_model(run / "model")
    found = lineage_of(str(run / "model"))
    assert ids(found.known) == {"sampled": ["a", "b"]}
    assert found.unknown == ["google/gemma: no run folder says what it was trained on"]


def test_the_models_before_it_count_too(tmp_path: Path) -> None:
    shown = tmp_path / "shown" / "demonstrations.jsonl"
    shown.parent.mkdir()
    shown.write_text(json.dumps({"question": "2 + 2?", "response": "\\boxed{4}", "answer": "4"}) + "\n")
    sft = make_run(tmp_path / "sft", model="google/gemma", data=[str(shown)])
    write_problems(make_run(tmp_path / "sampled") / "problems.jsonl", problems("a"))
    labels = make_run(tmp_path / "pairs", trajectories=[str(tmp_path / "sampled")])
    make_model(sft / "model")
    rows = tmp_path / "pairs" / "pairs.jsonl"  # a file in the label folder leads there as well
    run = make_run(tmp_path / "dpo", model=str(sft / "model"), data=str(rows))
    assert labels == rows.parent
    make_model(run / "model")
    assert ids(lineage_of(str(run / "model")).known) == {"sampled": ["a"], "shown": ["demonstrations/0"]}


def test_a_policy_of_the_loop_has_seen_its_iteration_and_those_before(tmp_path: Path) -> None:
    run = make_run(tmp_path / "loop", model="google/gemma", problems="gsm8k:train")
    for iteration in (1, 2, 3):
        part = run / f"iteration_{iteration}"
        write_problems(part / "current" / "problems.jsonl", problems(f"p/{iteration}"))
        make_run(part / "train", model="the one before", data=str(part / "labels"))
        make_model(part / "train" / "model")
    found = lineage_of(str(run / "iteration_2" / "train" / "model"))
    assert [p.id for part in found.known.values() for p in part] == ["p/1", "p/2"]
    assert found.unknown == ["google/gemma: no run folder says what it was trained on"]


def test_what_cannot_be_looked_into_is_said(tmp_path: Path) -> None:
    quickstart = make_run(tmp_path / "quickstart", method="dpo", demonstrations=10)
    make_model(quickstart / "sft" / "model")
    [told] = lineage_of(str(quickstart / "sft" / "model")).unknown
    assert told == f"{quickstart}: the demonstrations that its first policy was trained on"
    run = make_run(tmp_path / "dpo", model=str(tmp_path / "gone"), data=str(tmp_path / "lost.jsonl"))
    make_model(run / "model")
    unknown = lineage_of(str(run / "model")).unknown
    assert any("lost.jsonl" in text for text in unknown) and any("gone" in text for text in unknown)
