"""What a benchmark compares: the plain target, prompt lookup and drafts, joined to one and the same loaded target."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confu.bench.answers import DecoderEngine, Engine
from confu.bench.results import OURS, PLAIN
from confu.config import SWEEPABLE, ComputeConfig, TreeConfig
from confu.draft import load_draft_config
from confu.generate import Decoder
from confu.graphs import check_compile
from confu.linear import check_quantization
from confu.load import LOOKUP, find_device, find_dtype, is_untrained, join, pack, read_network, use_tuning
from confu.models import DEFAULT_TARGET, SHIPPED_DRAFTS, Progress, draft_path, load_target_model

TRAINED = ("eagle3", "confu")
SWEPT = ("draft-model", *TRAINED)


@dataclass(frozen=True)
class Draft:
    """A drafter as it was named."""

    name: str
    """What the results call it."""
    kind: str
    """``plain``, ``lookup``, ``draft-model``, ``eagle3`` or ``confu``."""
    path: str | None
    """What `load_decoder` takes for it."""

    @property
    def sha256(self) -> str | None:
        """Of a trained draft's weights."""
        if self.kind not in TRAINED:
            return None
        assert self.path is not None
        with (draft_path(self.path) / "model.safetensors").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Method:
    """A drafter with its tree, or a peer's way to decode, ready to answer."""

    name: str
    engine: Engine
    facts: dict[str, Any]
    """What run.json says of it: kind, engine, and whatever decides its answers and their speed."""


def choose_drafts(given: Sequence[str], wanted: Sequence[str], target: str | None = None) -> tuple[list[Draft], str]:
    """The drafts to compare, the plain target first, and the name of the target they share.

    ``given`` are drafts (NAME or NAME=PATH). A draft is called by its NAME, else by its kind where it is the only one
    of it, else by its folder. ``wanted`` chooses among ``plain``, ``lookup`` and the drafts, by name or kind; a kind
    that was not given is the shipped draft of the target. Empty, it means plain, lookup and all that is given.

    Raises ValueError for a name that is unknown or taken twice, and for drafts of different targets.
    """
    named = [draft.rpartition("=") for draft in given if draft != LOOKUP]  # which is there anyway
    kinds = [_kind(path) for _, _, path in named]
    drafts = [
        Draft(name or (kind if kinds.count(kind) == 1 else Path(path).name), kind, path)
        for (name, _, path), kind in zip(named, kinds, strict=True)
    ]
    target = _shared_target(drafts, target)
    free = [Draft(PLAIN, PLAIN, None), Draft(LOOKUP, LOOKUP, LOOKUP)]
    known = [*free, *drafts]
    names = [draft.name for draft in known]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"Two methods are called {twice}; name a draft otherwise, as NAME=PATH.")
    chosen = [known[0]]
    for word in wanted or names:
        found = [draft for draft in known if word in (draft.name, draft.kind)]
        if not found and word in TRAINED:
            found = _shipped(word, target)
        if not found and word in TRAINED:
            raise ValueError(f"--methods names {word}, but no such draft was given, and none is shipped for {target}.")
        if not found:
            close = difflib.get_close_matches(word, names, n=1)
            able = dict.fromkeys([*names, *(kind for kind in TRAINED if _shipped(kind, target))])
            hint = f"did you mean {close[0]}?" if close else f"give some of {', '.join(able)}."
            raise ValueError(f"--methods names {word!r}, which is none of them; {hint}")
        chosen += [draft for draft in found if draft not in chosen]
    return chosen, target


def load_methods(
    drafts: Sequence[Draft],
    target: str,
    tree: TreeConfig,
    *,
    sweep: Sequence[TreeConfig] = (),
    tuned: bool = False,
    compute: ComputeConfig | None = None,
    progress: Progress | None = None,
) -> list[Method]:
    """Every draft over one loaded target, with ``tree`` or, in a sweep, once with each of its trees that differ for it;
    their names then tell the trees apart. The plain target and lookup keep to ``tree``; with ``tuned``, a trained draft
    has the adaptive trees that `confu tune` found for it here, if it did."""
    compute = compute or ComputeConfig()
    place = find_device(compute.device)
    precision = find_dtype(compute.dtype, place)
    check_quantization(compute.quantization, place)
    check_compile(compute.compile, place)
    networks = {draft: read_network(draft.path, precision, place) for draft in drafts}
    model, tokenizer = load_target_model(target, dtype=precision, device=place, progress=progress)
    forward = pack(model, compute.quantization, compile=compute.compile)
    methods = []
    for draft in drafts:
        decoder = join(draft.path, networks[draft], model, forward, tokenizer, tree, progress=progress)
        if tuned and use_tuning(decoder, draft.path):
            assert decoder.costs is not None
            facts = _facts(draft, decoder.tree) | {"costs": dataclasses.asdict(decoder.costs)}
            methods.append(Method(draft.name, DecoderEngine(decoder), facts))
            continue
        contemplates = decoder.drafter is not None and decoder.drafter.contemplation is not None
        trees = sweep if sweep and draft.kind in SWEPT else [tree]
        if draft.kind == LOOKUP:
            trees = [dataclasses.replace(one, lookup=None) for one in trees]
        if not contemplates:
            trees = list(dict.fromkeys(dataclasses.replace(one, contemplate=None) for one in trees))
        for one in trees:
            name = draft.name if len(trees) == 1 else f"{draft.name} {_differences(one, trees)}"
            engine = DecoderEngine(Decoder(decoder.target, decoder.drafter, tokenizer, one))
            swept = {"swept": draft.name} if len(trees) > 1 else {}
            methods.append(Method(name, engine, _facts(draft, one) | swept))
    return methods


def mixed(methods: Sequence[Method]) -> str:
    """A sentence where only some drafts have the trees that `confu tune` found, which compares unlike things."""
    trained = [method for method in methods if method.facts["kind"] in TRAINED]
    without = [method.name for method in trained if "costs" not in method.facts]
    if not without or len(without) == len(trained):
        return ""
    return (
        f"Trees of {' and '.join(without)} have the default size, those of the others are as `confu tune` found them; "
        "tune all of them, or give all one tree (--tree-nodes)."
    )


def _facts(draft: Draft, tree: TreeConfig) -> dict[str, Any]:
    facts = {"engine": OURS, "kind": draft.kind, "sha256": draft.sha256}
    facts |= {"draft": Path(draft.path).name} if draft.path else {}
    return facts | ({"tree": dataclasses.asdict(tree)} if draft.kind != PLAIN else {})


def sweep_trees(base: TreeConfig, axes: Sequence[str], drafts: Sequence[Draft]) -> list[TreeConfig]:
    """All combinations of ``nodes=8,16`` ``contemplate=0,4`` ..., what is not named as in ``base``; none without
    axes. Raises ValueError for an axis that is none, or that changes none of the drafts."""
    values: dict[str, list[int]] = {}
    for axis in axes:
        name, _, numbers = axis.partition("=")
        parts = numbers.split(",")
        good = all(part.strip().isdecimal() for part in parts) and len({int(part) for part in parts}) == len(parts)
        if name not in SWEEPABLE or name in values or not good:
            raise ValueError(
                f"--sweep {axis!r} is no axis; give each of {', '.join(SWEEPABLE)} at most once, with different whole "
                "numbers, as nodes=8,16,30."
            )
        if not any(draft.kind in (("confu",) if name == "contemplate" else SWEPT) for draft in drafts):
            needed = "a confu draft" if name == "contemplate" else "a draft"
            raise ValueError(f"--sweep {axis!r} changes none of the methods; name {needed}, or leave it out.")
        values[name] = [int(part) for part in parts]
    points = itertools.product(*values.values()) if values else ()
    return [dataclasses.replace(base, **dict(zip(values, point, strict=True))) for point in points]


def _differences(tree: TreeConfig, among: Sequence[TreeConfig]) -> str:
    fields = [name for name in SWEEPABLE if len({getattr(other, name) for other in among}) > 1]
    return " ".join(f"{name}={getattr(tree, name)}" for name in fields)


def _kind(path: str) -> str:
    if is_untrained(path):
        return path.partition(":")[0]  # lookup or draft-model
    return load_draft_config(draft_path(path)).method


def _shared_target(drafts: Sequence[Draft], target: str | None) -> str:
    if target is not None:
        return target
    configs = [load_draft_config(draft_path(draft.path)) for draft in drafts if draft.path and draft.kind in TRAINED]
    names = sorted({config.target for config in configs})
    if len(names) > 1:
        raise ValueError(f"The drafts name different targets ({', '.join(names)}); give the one to use with --target.")
    return names[0] if names else DEFAULT_TARGET


def _shipped(kind: str, target: str) -> list[Draft]:
    folders = sorted(config.parent for config in SHIPPED_DRAFTS.glob("*/config.json"))
    configs = {folder.name: load_draft_config(folder) for folder in folders}
    found = [name for name, config in configs.items() if config.method == kind and config.target == target]
    return [Draft(kind, kind, found[0])] if found else []
