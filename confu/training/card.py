"""The model card of a trained draft: README.md in the Hub's format, from the files beside it and nothing else.

A fact that no file holds is left out. The trainer calls `write_card` when final/ is complete, and again for another
folder that it keeps, such as best/; provenance.json there says by ``selected_step`` which step's weights those are
where they are not the last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from confu.config import CONFU_SETTINGS
from confu.info import draft_info
from confu.models import DEFAULT_TARGET
from confu.training.report import read_metrics

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DEFAULT_TARGET_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the GGUF file of the default target was made from
EVALUATION = "eval"  # how the names of settings begin that say how tau is measured
WHAT = {
    "eagle3": "an EAGLE-3 draft, one decoder layer that reads three hidden states of the target",
    "confu": "a ConFu draft, an EAGLE-3 layer conditioned on the target's own prediction of the future, which "
    "contemplate tokens and soft prompts draw from it during verification",
}
USE = """\
`PATH_OR_ID` is this folder, or its id on the Hub.

    confu generate PATH_OR_ID --prompt "Why is the sky blue?"
    confu chat PATH_OR_ID
    confu verify-lossless PATH_OR_ID
"""
USE_IN_TRANSFORMERS = """
In transformers, with the target loaded as `model`:

```python
model.generate(**inputs, custom_generate="PATH_OR_ID", trust_remote_code=True)
```
"""
CITATION = """\
The method (this draft was made by an independent implementation):

```bibtex
@misc{confu2026,
  title = {ConFu: Contemplate the Future for Better Speculative Sampling},
  author = {Qin and Goel and Gagrani and Garrepalli and Lee and Sun},
  year = {2026},
  eprint = {2603.08899},
  archivePrefix = {arXiv}
}
```
"""


def write_card(
    folder: Path,
    *,
    run: Path | None = None,
    license: str | None = None,
    licenses: Mapping[str, str] | None = None,
) -> Path:
    """Write `card` as the README.md of the draft in ``folder``; returns its path."""
    path = folder / "README.md"
    path.write_text(card(folder, run=run, license=license, licenses=licenses), encoding="utf-8")
    return path


def card(
    folder: Path,
    *,
    run: Path | None = None,
    license: str | None = None,
    licenses: Mapping[str, str] | None = None,
    results: str = "",
) -> str:
    """The card of the draft in ``folder``.

    ``run`` is the run folder, whose metrics.jsonl holds the evaluations and whose name the card takes. ``license`` is
    that of the weights, by the Hub's identifier; ``licenses`` are those of the training data by file or data set (one
    named as on the Hub, owner/name, is linked from the card's front matter), else those that recipes name. ``results``
    is Markdown in place of the run's evaluation. Raises ValueError when ``folder`` holds no draft.
    """
    facts = draft_info(str(folder))
    origin = facts["provenance"] or {}
    licenses = licenses or _licenses(origin)
    recipe = origin.get("recipe", {})
    sections = {
        "Use": USE + (USE_IN_TRANSFORMERS if (folder / "custom_generate").is_dir() else ""),
        "Architecture": _table(_architecture(facts)),
        "Results": results or _results(run, origin),
        "Training": _training(origin, recipe),
        "Training data": _data(origin, recipe, licenses),
        "Limits": _limits(facts["config"], recipe),
        "Citation": CITATION,
        "Provenance": _provenance(origin),
    }
    name = (run or folder).resolve().name
    parts = [_front_matter(facts, license, licenses), f"# {_text(name)}\n", _introduction(facts)]
    parts += [f"## {title}\n\n{body}" for title, body in sections.items() if body]
    return "\n".join(parts)


def _front_matter(facts: Mapping[str, Any], license: str | None, licenses: Mapping[str, str]) -> str:
    """YAML; a JSON string is one of its scalars, so nothing that a user wrote can end it."""
    target = DEFAULT_TARGET_ON_HUB if facts["target"] == DEFAULT_TARGET else facts["target"]
    values = {
        "license": license,
        "base_model": target if HUB_ID.fullmatch(target) and not Path(target).exists() else None,
        "library_name": "confu",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", *dict.fromkeys(("eagle3", facts["method"]))],
        "datasets": [name for name in licenses if HUB_ID.fullmatch(name)],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items() if value]
    return "\n".join(["---", *lines, "---", ""])


def _introduction(facts: Mapping[str, Any]) -> str:
    return (
        f"This is {WHAT[facts['method']]}. It proposes tokens for speculative decoding with the target "
        f"**{_text(facts['target'])}**, which verifies all of them: the output has exactly the target's distribution, "
        "and the draft only decides how many tokens a round yields.\n"
    )


def _architecture(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    config = facts["config"]
    rows = [
        ("parameters", f"{facts['num_parameters']:,}"),
        ("hidden size", f"{config['hidden_size']:,}"),
        ("MLP width", f"{config['intermediate_size']:,}"),
        (
            "attention heads",
            f"{config['num_attention_heads']}, key-value heads {config['num_key_value_heads']}, "
            f"head width {config['head_dim']}",
        ),
        ("draft vocabulary", f"{config['draft_vocab_size']:,} of the target's {config['vocab_size']:,} tokens"),
        (
            "target layers whose input is read",
            f"{', '.join(map(str, config['feature_layers']))} of {config['num_target_layers']}",
        ),
        ("longest context", f"{config['max_position_embeddings']:,} tokens, the target's own"),
    ]
    if facts["method"] == "confu":
        rows += [
            ("of the parameters, contemplation", f"{facts['num_contemplation_parameters']:,}"),
            ("soft-prompt tokens", str(config["num_soft_prompts"])),
            ("experts of each mixture", f"{config['num_experts']}, of which {config['top_experts']} are used"),
            ("rows served by one future prediction", str(config["replication"])),
            ("form of the future", _text(config["future_form"])),
        ]
    return rows


def _results(run: Path | None, origin: Mapping[str, Any]) -> str:
    """The evaluation of these very weights."""
    if run is None or not (run / "metrics.jsonl").exists():
        return ""
    step = origin.get("selected_step") or origin.get("recipe", {}).get("steps")
    rows = [row for row in read_metrics(run / "metrics.jsonl")[1] if row["step"] == step]
    if not rows:
        return ""
    row = rows[-1]
    cells = [("mean acceptance length (tau), tree", f"**{row['tau']:.3f}**")]
    if row["chain_tau"] is not None:
        cells.append(("mean acceptance length (tau), chain", f"{row['chain_tau']:.3f}"))
    cells += [(f"acceptance at depth {depth}", f"{rate:.3f}") for depth, rate in enumerate(row["acceptance"], 1)]
    cells += [
        (_text(key), _text(Path(value).name if isinstance(value, str) else _toml(value)))
        for key, value in origin.get("recipe", {}).items()
        if key.startswith(EVALUATION) and value is not None
    ]
    return (
        f"Measured by the real decoder during training, at step {step:,}, on {row['num_prompts']:,} held-out prompts. "
        "Tau is tokens per verification round, bonus token included; acceptance at a depth is given that all depths "
        f"before were accepted.\n\n{_table(cells)}"
    )


def _training(origin: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return ""
    without_effect = CONFU_SETTINGS if recipe.get("method") == "eagle3" else ()
    lines = [
        f"{key} = {_toml(value)}"
        for key, value in recipe.items()
        if value is not None
        and key not in ("out", "data", "data_licenses", *without_effect)
        and not key.startswith(EVALUATION)
    ]
    seen, before = origin.get("supervised_tokens_seen"), _tokens_before(origin)
    head = "The recipe:"
    if seen is not None:
        started = f", {before:,} before that by the draft it started from" if before else ""
        head = f"{seen:,} supervised tokens were seen{started}. The recipe:"
    return "\n".join([head, "", "```toml", *lines, "```", ""])


def _tokens_before(origin: Mapping[str, Any]) -> int:
    """Supervised tokens that the draft a run started from had seen, and the one that it had started from, ..."""
    started = origin.get("started_from")
    return started.get("supervised_tokens_seen", 0) + _tokens_before(started) if isinstance(started, Mapping) else 0


def _licenses(origin: Mapping[str, Any]) -> dict[str, str]:
    """Those of the training data by its recipe, and of the data of the draft that a run started from, ..."""
    recipe, started = origin.get("recipe", {}), origin.get("started_from")
    before = _licenses(started) if isinstance(started, Mapping) else {}
    named = zip(recipe.get("data", ()), recipe.get("data_licenses") or (), strict=False)
    return before | {Path(name).name: terms for name, terms in named}


def _data(origin: Mapping[str, Any], recipe: Mapping[str, Any], licenses: Mapping[str, str]) -> str:
    facts = [
        ("files", ", ".join(_text(Path(name).name) for name in recipe.get("data", ()))),
        ("SHA-256", _text(origin.get("data_sha256", ""))),
        ("conversations", f"{origin['num_documents']:,}" if "num_documents" in origin else ""),
        *((f"skipped: {_text(reason)}", f"{count:,}") for reason, count in origin.get("skipped", {}).items()),
    ]
    sources = [(_text(source), _text(terms)) for source, terms in licenses.items()]
    tables = [_table([fact for fact in facts if fact[1]]), _table(sources, header=("source", "licence"))]
    return "\n".join(table for table in tables if table)


def _limits(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    limits = [
        "It serves its target only: a draft learns the hidden states of one model.",
        f"It never proposes {config['vocab_size'] - config['draft_vocab_size']:,} of the target's tokens; those come "
        "from the target, one a round.",
        "Acceptance counts tokens, not seconds: a speed-up depends on the machine, the tree and the text.",
    ]
    if "max_length" in recipe:
        limits.append(f"It was trained on conversations cut at {recipe['max_length']:,} tokens.")
    return "".join(f"- {limit}\n" for limit in limits)


def _provenance(origin: Mapping[str, Any]) -> str:
    versions = [f"{name} {origin[name]}" for name in ("python", "torch", "transformers") if origin.get(name)]
    dirty = ", with uncommitted changes" if origin.get("dirty") else ""
    facts = [
        ("commit", f"{origin['commit']}{dirty}" if origin.get("commit") else ""),
        ("versions", ", ".join(versions)),
        ("selected step", str(origin.get("selected_step") or "")),
    ]
    return _table([(name, _text(value)) for name, value in facts if value])


def _table(rows: Sequence[tuple[str, str]], header: tuple[str, str] = ("", "")) -> str:
    """A Markdown table, or nothing when it has no rows; cells that users wrote come through `_text`."""
    return "".join(f"| {name} | {value} |\n" for name, value in (header, ("---", "---"), *rows)) if rows else ""


def _text(value: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|&~#!$])", r"\\\1", " ".join(value.split()))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items() if item is not None) + "}"
    return json.dumps(value, ensure_ascii=False)
