"""The model card: the Hub's own reader takes its front matter, it says what the files say, and text stays text."""

import html
import json
import re
import tomllib
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tiny_data import tiny_draft

from confu.training.card import card, write_card

PROVENANCE = {
    "argv": ["confu", "train", "/home/me/secret.toml"],
    "commit": "0123abc",
    "dirty": True,
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "data_sha256": "ab" * 32,
    "num_documents": 8161,
    "skipped": {"no assistant tokens within max_length": 20},
    "supervised_tokens_seen": 320464,
    "recipe": {
        "method": "confu",
        "out": "/home/me/out",
        "data": ["/home/me/answers.jsonl"],
        "init": None,
        "steps": 350,
        "max_length": 1024,
        "lr": 5e-05,
        "lr_experts": 3e-3,
        "dtype": "bfloat16",
        "eval_prompts": "/home/me/held_out.jsonl",
        "eval_tokens": 64,
        "eval_tree": {"nodes": 30, "contemplate": None},
    },
}


def evaluation(step: int, tau: float, chain_tau: float | None = 1.75) -> dict:
    row = {"step": step, "tokens_seen": 100 * step, "tau": tau, "chain_tau": chain_tau}
    return row | {"acceptance": [0.625, 0.5], "num_prompts": 24, "seconds": 9.0}


def make_run(folder: Path, *, method: str = "confu", target: str = "org/target", **changes) -> Path:
    """A run folder with final/ and two evaluations; returns final/."""
    final = folder / "final"
    tiny_draft(method).save(final)
    config = json.loads((final / "config.json").read_text()) | {"target": target}
    (final / "config.json").write_text(json.dumps(config))
    recipe = PROVENANCE["recipe"] | {"method": method}
    (final / "provenance.json").write_text(json.dumps(PROVENANCE | {"recipe": recipe} | changes))
    rows = [evaluation(200, 2.5), {"step": 350, "loss": 1.0}, evaluation(350, 2.25, None)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return final


def rendered(card: str) -> tuple[dict[str, str], str]:
    """First two cells of every table row as a reader sees them, and the whole text."""
    page = MarkdownIt("commonmark").enable("table").render(ModelCard(card).text)
    rows = re.findall(r"<tr>\s*<td>(.*?)</td>\s*<td>(.*?)</td>", page, re.DOTALL)
    return {html.unescape(name): html.unescape(value) for name, value in rows}, page


def test_tokens_of_the_drafts_before_are_counted(tmp_path):
    first = {"supervised_tokens_seen": 1000}
    second = first | {"started_from": first}
    card = write_card(make_run(tmp_path / "run", started_from=second)).read_text()
    assert "320,464 supervised tokens were seen, 2,000 before that by the draft it started from." in card


def test_licences_of_recipes_are_shown_those_of_drafts_before_included(tmp_path):
    recipe, first = PROVENANCE["recipe"], {"recipe": {"data": ["old.jsonl"], "data_licenses": ["mit"]}}
    recipe = recipe | {
        "data": ["/home/me/answers.jsonl", "hub:org/chats"],
        "data_licenses": ["cc-by-4.0", "apache-2.0"],
    }
    card = write_card(make_run(tmp_path / "run", recipe=recipe, started_from=first)).read_text()
    rows = {name: rendered(card)[0].get(name) for name in ("old.jsonl", "answers.jsonl", "chats")}
    assert rows == {"old.jsonl": "mit", "answers.jsonl": "cc-by-4.0", "chats": "apache-2.0"}
    assert "data_licenses" not in card


def test_results_measured_elsewhere_take_the_place_of_the_runs(tmp_path):
    final = make_run(tmp_path / "run")
    text = card(final, run=tmp_path / "run", results="tau 3 elsewhere")
    assert "## Results\n\ntau 3 elsewhere" in text
    assert "2.250" not in text


def test_card_says_what_the_files_say(tmp_path):
    final = make_run(tmp_path / "my_run")
    path = write_card(final, run=tmp_path / "my_run", license="apache-2.0", licenses={"org/chats": "mit"})
    assert path == final / "README.md"
    card = path.read_text()
    assert ModelCard(card).data.to_dict() == {
        "license": "apache-2.0",
        "base_model": "org/target",
        "library_name": "confu",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "eagle3", "confu"],
        "datasets": ["org/chats"],
    }
    rows, page = rendered(card)
    draft = tiny_draft("confu")
    num_parameters = sum(p.numel() for p in draft.parameters())
    num_contemplation = sum(p.numel() for p in draft.contemplation.parameters())
    assert rows == {
        "parameters": f"{num_parameters:,}",
        "hidden size": "48",
        "MLP width": "80",
        "attention heads": "4, key-value heads 2, head width 12",
        "draft vocabulary": "40 of the target's 64 tokens",
        "target layers whose input is read": "2, 4, 5 of 8",
        "longest context": f"{draft.config.max_position_embeddings:,} tokens, the target's own",
        "of the parameters, contemplation": f"{num_contemplation:,}",
        "soft-prompt tokens": str(draft.config.num_soft_prompts),
        "experts of each mixture": f"{draft.config.num_experts}, of which {draft.config.top_experts} are used",
        "form of the future": "row",
        "rows served by one future prediction": str(draft.config.replication),
        "mean acceptance length (tau), tree": "<strong>2.250</strong>",
        "acceptance at depth 1": "0.625",
        "acceptance at depth 2": "0.500",
        "eval_prompts": "held_out.jsonl",
        "eval_tokens": "64",
        "eval_tree": "{nodes = 30}",
        "files": "answers.jsonl",
        "SHA-256": "ab" * 32,
        "conversations": "8,161",
        "skipped: no assistant tokens within max_length": "20",
        "org/chats": "mit",
        "commit": "0123abc, with uncommitted changes",
        "versions": "python 3.11.7, torch 2.13.0, transformers 5.23.0",
    }
    assert "at step 350, on 24 held-out prompts." in page
    assert "<h1>my_run</h1>" in page
    assert "320,464 supervised tokens were seen" in page
    assert "never proposes 24 of the target's tokens" in page
    assert "cut at 1,024 tokens" in page
    assert "2603.08899" in page
    assert "secret" not in card


def test_recipe_is_toml_without_places_and_settings_without_effect(tmp_path):
    for method in ("confu", "eagle3"):
        card = write_card(make_run(tmp_path / method, method=method)).read_text()
        recipe = tomllib.loads(re.search(r"```toml\n(.*?)```", card, re.DOTALL)[1])
        common = {"method": method, "steps": 350, "max_length": 1024, "lr": 5e-05, "dtype": "bfloat16"}
        assert recipe == (common | {"lr_experts": 3e-3} if method == "confu" else common)


def test_results_are_those_of_the_selected_step(tmp_path):
    final = make_run(tmp_path / "run", selected_step=200)
    rows, page = rendered(write_card(final, run=tmp_path / "run").read_text())
    assert rows["mean acceptance length (tau), tree"] == "<strong>2.500</strong>"
    assert rows["mean acceptance length (tau), chain"] == "1.750"
    assert rows["selected step"] == "200"
    assert "at step 200" in page


def test_weights_that_were_not_evaluated_have_no_results(tmp_path):
    final = make_run(tmp_path / "run", selected_step=351)
    assert "Results" not in write_card(final, run=tmp_path / "run").read_text()
    assert "Results" not in write_card(final).read_text()


def test_absent_facts_are_left_out(tmp_path):
    final = make_run(tmp_path / "run", method="eagle3", target=str(tmp_path))
    (final / "provenance.json").unlink()
    card = write_card(final, run=tmp_path / "run").read_text()
    assert ModelCard(card).data.to_dict() == {
        "library_name": "confu",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "eagle3"],
    }
    titles = ["Use", "Architecture", "Limits", "Citation"]
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == titles
    assert "None" not in card


def test_default_target_is_linked_to_its_origin(tmp_path):
    card = write_card(make_run(tmp_path / "run", target="smollm2-135m")).read_text()
    assert ModelCard(card).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


NASTY = "a|b `c` *d* _e_ <script>x</script> [f](http://g) ![h](i) &amp; \\ # $j$ ~~k~~"


def test_text_stays_text(tmp_path):
    """Front matter, tables, paragraphs and the recipe: no text ends what it stands in."""
    lines = f"{NASTY}\n---\nlicense: mit\n```\n## Title\n| x |"
    recipe = {"method": "confu", "target": lines, "data": [f"{NASTY.replace('/', '')}.jsonl"]}
    final = make_run(tmp_path / "run", target=lines, recipe=recipe, skipped={lines: 3})
    card = write_card(final, license=lines, licenses={lines: NASTY}).read_text()
    assert ModelCard(card).data.license == lines
    rows, page = rendered(card)
    assert rows[" ".join(lines.split())] == NASTY
    assert rows["files"] == f"{NASTY.replace('/', '')}.jsonl"
    assert rows[f"skipped: {' '.join(lines.split())}"] == "3"
    assert html.escape(" ".join(lines.split()), quote=False) in page.replace("&quot;", '"')
    assert "<script" not in page
    assert page.count("<h2>") == 7
    assert tomllib.loads(re.search(r"```toml\n(.*?)\n```", card, re.DOTALL)[1])["target"] == lines


def test_folder_without_a_draft_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        write_card(tmp_path)
