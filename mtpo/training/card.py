"""The model card: what a trained model is, so that whoever gets its folder can judge it and make it again."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mtpo.batches import Mask
from mtpo.runs import git_commit, versions
from mtpo.training.settings import TrainingSettings


class Source(NamedTuple):
    """Where a method is from."""

    equation: str
    """Of the loss of one example. D is the difference of the log-ratios of policy and reference, rho, of a pair."""
    paper: str


DPO = "https://arxiv.org/abs/2305.18290"
GPO = "https://arxiv.org/abs/2402.05749"
M_DPO = "https://arxiv.org/abs/2409.02392"
OAIF = "https://arxiv.org/abs/2402.04792"
IPO_MD = "https://arxiv.org/abs/2403.08635"
NASH_MD = "https://arxiv.org/abs/2312.00886, section 6"
MTPO = "https://arxiv.org/abs/2405.14655, section 5"
SOURCES: dict[str, Source] = {
    "sft": Source("-log p(action tokens)", M_DPO),
    "raft": Source("-log p(action tokens) of correct trajectories", "https://arxiv.org/abs/2304.06767"),
    "dpo": Source("-log sigmoid(beta D)", f"{M_DPO}, eq. 13, after {DPO}, eq. 7"),
    "cdpo": Source("-(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D), e = label_smoothing", DPO),
    "ipo": Source("(D - 1 / (2 tau))^2", "https://arxiv.org/abs/2310.12036, eq. 17"),
    "slic": Source("max(0, 1 - beta D)", f"{GPO}, table 1"),
    "exponential": Source("exp(-beta D)", f"{GPO}, table 1"),
    "truncated_quadratic": Source("max(0, 1 - beta D)^2", f"{GPO}, table 1"),
    "squared": Source("(1 - beta D)^2", f"{GPO}, table 1"),
    "savage": Source("sigmoid(-beta D)^2", f"{GPO}, table 1"),
    "kto": Source(
        "1 - sigmoid(beta (rho - z0)) if desirable, 1 - sigmoid(beta (z0 - rho)) if not",
        f"{M_DPO}, after https://arxiv.org/abs/2402.01306, eq. 8",
    ),
    "pmpo": Source(
        "-alpha log p of accepted, (1 - alpha) log p of rejected, beta KL(reference, policy)",
        "https://arxiv.org/abs/2410.04166",
    ),
    "dro_v": Source("(reward - V - tau rho)^2 / 2", "https://arxiv.org/abs/2405.19107"),
    "online_dpo": Source("-P log sigmoid(beta D) - (1 - P) log sigmoid(-beta D), P by a judge", OAIF),
    "online_ipo": Source("P (D - 1 / (2 tau))^2 + (1 - P) (D + 1 / (2 tau))^2, P by a judge", OAIF),
    "online_slic": Source("P max(0, 1 - beta D) + (1 - P) max(0, 1 + beta D), P by a judge", OAIF),
    "ipo_md": Source("that of online_ipo, on samples of the mixture with the reference", IPO_MD),
    "nash_md": Source("-sum_n (P - 1/2 - tau sum_{k >= n} log-ratio_k) log p_n, P by a judge", NASH_MD),
    "nash_ema": Source("that of nash_md, against the average of the policy's weights", NASH_MD),
    "mtpo": Source("-sum of the turns' advantages times log p(turn), and (V - return)^2", MTPO),
    "mtpo_tau": Source("that of mtpo, on samples of the mixture with the reference", MTPO),
    "rlhf": Source("that of mtpo, with a reward in place of a preference", MTPO),
    "online_kto": Source("that of kto, z0 being the mean of the policy's own log-ratios", M_DPO),
}
"""Of the methods that have a paper of their own; a card without one names the method alone."""

MASKS: dict[Mask, str] = {
    "action": "the tokens that the model sampled are trained; prompts and tool output are only read",
    "none": "all that follows the prompt is trained, tool output included",
    "last_turn": "the tokens that the model sampled in its last turn are trained",
}

GEMMA_LICENCE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms. "
    "A model trained from it is a model derivative under these terms: whoever passes it on passes them on, too."
)


@dataclass(frozen=True)
class RunFacts:
    """What a run's settings and metrics do not say."""

    base_model: str = ""
    """Name or folder of the model that training started from."""
    reference: str = ""
    num_rows: int = 0
    num_dropped: int = 0
    """Rows that were longer than the context."""
    data: Sequence[tuple[str, str]] = ()
    """Names and SHA-256 of the files that the rows are from."""


def model_card(
    settings: TrainingSettings,
    facts: RunFacts,
    metrics: Mapping[str, float],
    *,
    family: str,
    is_adapter: bool,
) -> str:
    """README.md of a model folder: front matter that the hub reads, then what people read.

    Args:
        metrics: of the last step.
        family: `model_type` of the model's config.
        is_adapter: the folder holds an adapter and not the whole model.
    """
    is_gemma = family.startswith("gemma")
    matter: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers"}
    matter |= {"base_model": facts.base_model} if _is_hub_name(facts.base_model) else {}
    matter |= {"license": "gemma"} if is_gemma else {}
    matter |= {"pipeline_tag": "text-generation", "tags": ["mtpo", settings.method]}
    changed = {name: value for name, value in _settings(settings).items() if value != _defaults().get(name)}
    made_with = versions() | {"mtpo commit": git_commit() or "unknown"}
    parts = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False)}---",
        f"# {'Adapter' if is_adapter else 'Model'} trained by {settings.method}",
        "Multi-turn preference learning with [mtpo](https://arxiv.org/abs/2409.02392), a code interpreter as tool.",
        _table("what", "value", _summary(settings, facts)),
        "## Metrics of the last step\n\n"
        + _table("metric", "value", {k: f"{v:.4g}" for k, v in metrics.items()}),
        "## Settings that differ from the defaults\n\n" + _table("setting", "value", changed),
        "## Made with\n\n" + _table("package", "version", made_with),
    ]
    if is_gemma:
        parts.append(f"## Licence\n\n{GEMMA_LICENCE}")
    return "\n\n".join(parts) + "\n"


def file_digests(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Names and SHA-256, hexadecimal."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return digests


def _summary(settings: TrainingSettings, facts: RunFacts) -> dict[str, object]:
    source = SOURCES.get(settings.method)
    rows = {
        "method": settings.method,
        "loss of an example": f"`{source.equation}`" if source else None,
        "paper": source.paper if source else None,
        "options": ", ".join(f"{name} = {value}" for name, value in settings.options.items()) or "none",
        "base model": facts.base_model or "not named",
        "reference": (facts.reference or "not named") if settings.recipe.needs_reference else "none",
        "mask": f"{settings.mask}: {MASKS[settings.mask]}",
        "layout": settings.layout,
        "rows": f"{facts.num_rows} ({settings.recipe.rows}), {facts.num_dropped} dropped as too long",
    }
    files = "; ".join(f"`{name}`, SHA-256 {digest}" for name, digest in facts.data)
    return {name: value for name, value in (rows | {"data": files or None}).items() if value is not None}


def _table(left: str, right: str, rows: Mapping[str, object]) -> str:
    def cell(value: object) -> str:
        return " ".join(str(value).split()).replace("|", "\\|")

    lines = [f"| {left} | {right} |", "|---|---|"]
    return "\n".join(lines + [f"| {cell(name)} | {cell(value)} |" for name, value in rows.items()])


def _settings(settings: TrainingSettings) -> dict[str, Any]:
    """Of training alone, whatever else a recipe's config holds."""
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(TrainingSettings)}


def _defaults() -> dict[str, Any]:
    return _settings(TrainingSettings(method="sft", learning_rate=1.0)) | {
        "method": None,
        "learning_rate": None,
    }


def _is_hub_name(name: str) -> bool:
    return (
        bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.startswith(".") and not Path(name).exists()
    )
