"""Every setting of the package: frozen dataclasses, read from TOML or JSON, unknown keys refused with a suggestion.

One line of documentation stands under each field; the command line shows that text as its help.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from confu.training.track import TRACKERS

T = TypeVar("T")

MOST = 4096
"""Nodes, levels or children of a tree; a number beyond it is a slip, and would only run out of memory."""

FUTURE_FORMS = ("row", "kv", "input", "head")
"""How f enters the draft (METHOD 8, docs/training.md): a row of its own, keys and values projected from it, a third
input of every row, or an addition to what the head reads."""
ROUTERS = ("state", "token")
"""What chooses the experts of [con] (METHOD 4)."""


@dataclass(frozen=True)
class TreeConfig:
    """Shape of the draft tree (METHOD: EAGLE-2's rule). Chain drafting is ``topk=1``."""

    nodes: int = 30
    """Nodes the target verifies each round, the root included (N)."""
    depth: int = 6
    """Levels of drafted tokens below the root."""
    topk: int = 10
    """Children expanded per node, and nodes expanded per level."""
    contemplate: int | None = None
    """Most probable nodes that carry a contemplate row (C); unset means every node, 0 switches the future off."""
    lookup: int | None = None
    """Where the last so many tokens stood before, what followed them is drafted (prompt lookup), one chain as long as
    ``nodes`` allows instead of a tree, and the draft rests; unset or 0 means never."""

    def __post_init__(self) -> None:
        for name in ("nodes", "depth", "topk"):
            _at_least(self, name, 1)
            if getattr(self, name) > MOST:
                raise ValueError(f"{name} is {getattr(self, name)}; give at most {MOST}.")
        if self.contemplate is not None:
            _at_least(self, "contemplate", 0)
        if self.lookup is not None:
            _at_least(self, "lookup", 0)

    def num_con(self, nodes: int) -> int:
        """Contemplate rows of a tree with so many nodes."""
        return nodes if self.contemplate is None else min(self.contemplate, nodes)


@dataclass(frozen=True)
class TreeOptions:
    """What a command line says of the tree. Without any of these, a draft uses what `confu tune` found for it here."""

    nodes: int | None = None
    """Nodes the target verifies each round, the root included (30)."""
    depth: int | None = None
    """Levels of drafted tokens below the root (6)."""
    topk: int | None = None
    """Children expanded per node, and nodes expanded per level (10)."""
    contemplate: int | None = None
    """Most probable nodes that carry a contemplate row; every node otherwise, 0 switches the future off."""
    lookup: int | None = None
    """Draft what followed the last so many tokens where they stood before, without the draft's network; 0 never does,
    nor do trees that `confu tune` has not sized."""

    @property
    def given(self) -> bool:
        return self != TreeOptions()

    @property
    def shaped(self) -> bool:
        """Whether a tree is given that what `confu tune` found must not replace; lookup goes with both."""
        return self != TreeOptions(lookup=self.lookup)

    def config(self) -> TreeConfig:
        """The tree, by `TreeConfig` where nothing is said. Raises ValueError as it does."""
        return TreeConfig(**{name: value for name, value in dataclasses.asdict(self).items() if value is not None})


def tree_option(field: str) -> str:
    """What a field of `TreeOptions` is called on a command line."""
    return f"--{field}" if field in ("contemplate", "lookup") else f"--tree-{field}"


@dataclass(frozen=True)
class ComputeConfig:
    """Where and how exactly the models compute."""

    dtype: str = "auto"
    """float32, bfloat16 or float16; auto is bfloat16 where the device computes it."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto is cuda where there is one."""
    quantization: str | None = None
    """int8 rounds the target's weights (CPU): less to read, and another target, which the output then follows."""
    compile: bool = False
    """Replay forwards and draft trees as CUDA graphs (Llama-like targets): small models no longer wait for launches."""


SWEEPABLE = tuple(field.name for field in dataclasses.fields(TreeConfig))


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn from the target; the defaults of ``transformers`` are not inherited."""

    max_new_tokens: int = 256
    """Most tokens to generate."""
    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as probable as the best one."""
    repetition_penalty: float = 1.0
    """Divide (or multiply, when negative) the logits of tokens already seen by this."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; the text ends before them."""
    ignore_eos: bool = False
    """Go on past the end-of-sequence token (for measurements)."""
    seed: int = 0
    """Seed of the draws; sequence i of a batch uses seed + i. What drafts does not matter (`Sampler`)."""

    def __post_init__(self) -> None:
        _at_least(self, "max_new_tokens", 1)
        _at_least(self, "temperature", 0)
        _at_least(self, "top_k", 0)
        _at_least(self, "seed", 0)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number above 0 and up to 1 (1 keeps every token).")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; give a number from 0 (off) to 1.")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; give a number above 0 (1 is off).")
        if any(not text for text in self.stop):
            raise ValueError("A stop string is empty; give at least one character.")


@dataclass(frozen=True)
class RegenerateConfig:
    """How the target answers the prompts of training data anew."""

    max_new_tokens: int = 512
    """Most tokens of an answer; one that is cut off ends its conversation."""
    temperature: float = 0.0
    """Temperature of sampled answers; 0 makes every answer greedy."""
    greedy_share: float = 0.0
    """Share of the rows that are answered greedily nevertheless; a row's id decides."""
    seed: int = 0
    """Seed of the draws and of the choice of greedy rows."""
    batch_size: int = 16
    """Rows decoded together; sampled answers depend on it."""
    max_failed: float = 0.1
    """Stop when more than this share of the rows has failed, once 20 have."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            _at_least(self, name, 1)
        for name in ("temperature", "seed"):
            _at_least(self, name, 0)
        for name in ("greedy_share", "max_failed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number from 0 to 1.")
        if self.greedy_share and self.temperature == 0:
            raise ValueError("greedy_share has no effect at temperature 0; give a temperature, or leave it out.")


@dataclass(frozen=True)
class BenchConfig:
    """What decides the answers of a benchmark, beside target, drafts and trees."""

    max_new_tokens: int = 256
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 is greedy, and every answer is compared with the plain target's."""
    batch_size: int = 1
    """Questions answered together."""
    seed: int = 0
    """Seed of the draws; each question, turn and repeat has its own, and so has every other engine."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            _at_least(self, name, 1)
        for name in ("temperature", "seed"):
            _at_least(self, name, 0)


@dataclass(frozen=True)
class DraftConfig:
    """Architecture of a draft and of the target it belongs to; saved as ``config.json`` beside the weights."""

    method: str
    """``eagle3`` or ``confu``."""
    target: str
    """Name, folder or Hub id of the target."""
    hidden_size: int
    """Width D of target and draft."""
    intermediate_size: int
    """Width of the draft layer's MLP."""
    num_attention_heads: int
    """Query heads of the draft layer."""
    num_key_value_heads: int
    """Key-value heads of the draft layer."""
    head_dim: int
    """Width of one head of the draft layer."""
    vocab_size: int
    """Target vocabulary V."""
    draft_vocab_size: int
    """Draft vocabulary U, the most frequent tokens of the training answers."""
    num_target_layers: int
    """Layers L of the target."""
    feature_layers: tuple[int, int, int]
    """Layers whose INPUT is captured (index into HF ``output_hidden_states``, 0 is the embedding)."""
    max_position_embeddings: int
    """Longest context, the target's own."""
    rope_parameters: dict[str, Any]
    """Rotary embedding settings as in the target's config."""
    rms_norm_eps: float = 1e-5
    """Epsilon of the draft's norms."""
    norm_before_residual: bool = False
    """Whether the layer's residual is the normed hidden state (imported drafts) instead of the hidden state itself."""
    target_key_value_heads: int | None = None
    """Key-value heads of the target's layers (soft prompts), where they are not the draft's."""
    target_head_dim: int | None = None
    """Width of one head of the target's layers, where it is not the draft's."""
    num_soft_prompts: int = 0
    """Soft-prompt tokens S in the target's KV cache (ConFu)."""
    num_experts: int = 0
    """Experts E of the [con] and [f] embeddings (ConFu)."""
    top_experts: int = 0
    """Experts kept by the router (K)."""
    replication: int = 0
    """Draft rows that one future prediction serves (l)."""
    future_form: str = "row"
    """How f enters the draft: ``row``, ``kv``, ``input`` or ``head`` (ConFu; see `DraftModel`)."""
    router: str = "state"
    """What chooses the experts of [con]: ``state`` (h of the latest accepted token) or ``token`` (the one followed)."""
    future_steps: int = 0
    """Places behind its anchor for which the head reads f by weights of their own (form ``head``)."""
    vocabulary_fingerprint: str = ""
    """SHA-256 of the data files whose token counts chose the draft vocabulary."""

    def __post_init__(self) -> None:
        if self.method not in ("eagle3", "confu"):
            raise ValueError(f"method is {self.method!r}; a draft is 'eagle3' or 'confu'.")
        for name in ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "draft_vocab_size"):
            _at_least(self, name, 1)
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size is {self.draft_vocab_size}, more than the target's {self.vocab_size} tokens."
            )
        if self.method == "confu":
            for name in ("num_experts", "top_experts", "replication"):
                _at_least(self, name, 1)
            _at_least(self, "num_soft_prompts", 0)
            if self.top_experts > self.num_experts:
                raise ValueError(f"top_experts is {self.top_experts}, more than the {self.num_experts} experts.")
        _one_of(self, "future_form", FUTURE_FORMS)
        _one_of(self, "router", ROUTERS)
        if self.method == "confu" and self.future_form == "head":
            _at_least(self, "future_steps", 1)

    def future_is(self, *forms: str) -> bool:
        """Whether this is a ConFu draft whose f enters in one of these forms."""
        return self.method == "confu" and self.future_form in forms


CONFU_SETTINGS = (
    *("num_soft_prompts", "num_experts", "top_experts", "replication", "max_router_lag", "future_form", "router"),
    *("lr_prompts", "lr_experts"),
)
"""Fields of a recipe that an eagle3 run does not read."""
EVAL_SETTINGS = ("eval_prompts", "eval_limit", "eval_tokens", "eval_nodes", "eval_depth", "eval_topk")


@dataclass(frozen=True)
class TrainConfig:
    """A training recipe (METHOD: training). One loop serves ``eagle3`` and ``confu``."""

    method: str
    """``eagle3`` or ``confu``."""
    out: str
    """Run folder: config, metrics, checkpoints and the final draft go here."""
    data: tuple[str, ...]
    """Chat JSONL files (``messages``, or ``prompt`` and ``response``), Hub data sets (``hub:OWNER/NAME``), or one
    folder that `confu data prepare` wrote."""
    data_licenses: tuple[str, ...] | None = None
    """Licences of ``data``, one for each, for the draft's model card."""
    target: str = "smollm2-135m"
    """Name, folder or Hub id of the target."""
    init: str | None = None
    """Draft to start from; ConFu starts from a trained EAGLE-3 draft."""
    draft_vocab_size: int = 8192
    """Draft vocabulary U when a new one is counted."""
    keep_vocabulary: bool = False
    """Go on with the vocabulary of ``init`` even where it was counted on other data."""
    steps: int = 1000
    """Optimiser steps."""
    batch_tokens: int = 4096
    """Tokens per micro-batch, padding included."""
    accumulate: int = 1
    """Micro-batches per optimiser step; processes that torchrun starts share them."""
    max_length: int = 1024
    """Longer conversations are cut here."""
    ttt_steps: int = 6
    """Training-time-test steps K: how many draft steps are unrolled."""
    step_decay: float = 0.8
    """Weight of unrolled step k is this to the power k."""
    lr: float = 1e-3
    """Peak learning rate of the draft layer and head."""
    lr_prompts: float = 1e-2
    """Peak learning rate of the soft prompts."""
    lr_experts: float = 3e-3
    """Peak learning rate of experts and routers."""
    warmup: float = 0.03
    """Share of the steps that warm up linearly; a cosine to a tenth follows."""
    clip: float = 1.0
    """Largest gradient norm of each parameter group."""
    num_soft_prompts: int = 16
    """Soft-prompt tokens S."""
    num_experts: int = 8
    """Experts E of each mixture."""
    top_experts: int = 2
    """Experts kept by the router."""
    replication: int = 8
    """Rows served by one anchor (l); about one anchor in l rows is drawn."""
    future_form: str = "head"
    """How f enters the draft: ``row``, ``kv``, ``input`` or ``head``."""
    router: str = "state"
    """What chooses the experts of [con]: ``state`` (h of the latest accepted token) or ``token`` (the one followed)."""
    max_router_lag: int = 7
    """With ``router`` state, an anchor is routed by a position 1 to this many steps before it."""
    seed: int = 0
    """Seed of data order, anchors and new weights."""
    dtype: str = "bfloat16"
    """Compute type of the target and of autocast; master weights stay float32."""
    shard_target: bool = False
    """Spread the target's layers over torchrun's processes (FSDP), for a target that does not fit on one device."""
    track: str | None = None
    """Tracker that gets the rows of metrics.jsonl, too: ``trackio``, ``wandb`` or ``tensorboard``."""
    features: str = "online"
    """``online`` runs the target every step; ``cache`` only in the first epoch, keeping its states on disk (eagle3)."""
    feature_store: str | None = None
    """Folder of that cache, for runs on the same data and target to share; unset is ``features`` in the run folder."""
    evaluate_every: int = 0
    """Steps between measurements of tau on held-out prompts; final/ is then the best draft. 0 is off."""
    eval_prompts: str | None = None
    """JSONL file of those prompts (``prompt``, or ``messages``); what the training data answers is left out."""
    eval_limit: int = 32
    """Take the first so many."""
    eval_tokens: int = 64
    """Tokens of each answer."""
    eval_nodes: int = 30
    """Nodes of the draft tree that tau is measured with."""
    eval_depth: int = 6
    """Its levels, and the length of the chains."""
    eval_topk: int = 10
    """Its children expanded per node."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        if self.method not in ("eagle3", "confu"):
            raise ValueError(f"method is {self.method!r}; give 'eagle3' or 'confu'.")
        if not self.data:
            raise ValueError("data names no file; give at least one chat JSONL file, hub: data set or prepared folder.")
        if self.data_licenses is not None and len(self.data_licenses) != len(self.data):
            raise ValueError(
                f"data_licenses is {len(self.data_licenses)} for {len(self.data)} of data; give one for each, or none."
            )
        for name in (
            "steps",
            "batch_tokens",
            "accumulate",
            "ttt_steps",
            "draft_vocab_size",
            "checkpoint_every",
            "log_every",
        ):
            _at_least(self, name, 1)
        for name in ("num_experts", "top_experts", "replication", "max_router_lag"):
            _at_least(self, name, 1)
        for name in ("eval_limit", "eval_tokens", "eval_nodes", "eval_depth", "eval_topk"):
            _at_least(self, name, 1)
        for name in ("num_soft_prompts", "evaluate_every"):
            _at_least(self, name, 0)
        _at_least(self, "max_length", 8)
        for name in ("lr", "lr_prompts", "lr_experts", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; give a finite number above 0.")
        for name in ("warmup", "step_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number from 0 to 1.")
        _one_of(self, "future_form", FUTURE_FORMS)
        _one_of(self, "router", ROUTERS)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; train in 'bfloat16' or 'float32'.")
        if self.top_experts > self.num_experts:
            raise ValueError(f"top_experts is {self.top_experts}, more than the {self.num_experts} experts.")
        if self.track is not None:
            _one_of(self, "track", TRACKERS)
        if self.evaluate_every and self.eval_prompts is None:
            raise ValueError(
                f"evaluate_every is {self.evaluate_every}, but eval_prompts names no file; give a JSONL file of "
                "held-out prompts, or leave evaluate_every at 0."
            )
        if self.features not in ("online", "cache"):
            raise ValueError(f"features is {self.features!r}; give 'online' or 'cache'.")
        if self.features == "cache" and self.method == "confu":
            raise ValueError(
                "features = 'cache' serves eagle3 runs: a confu run needs the target's keys and values, so the target "
                "runs anyway; leave features at 'online'."
            )
        if self.features == "cache" and self.shard_target:
            raise ValueError(
                "features = 'cache' lets each process skip the target where its states are stored, but a sharded "
                "target runs in all processes or in none; leave out one of features and shard_target."
            )
        if self.method == "confu" and self.init is None:
            raise ValueError("A confu run starts from a trained eagle3 draft; set init to its folder.")

    def without_effect(self) -> list[str]:
        """A sentence for each kind of setting that differs from its default and changes nothing."""
        confu = self.method == "confu"
        kinds = {
            "in an eagle3 run": () if confu else CONFU_SETTINGS,
            "with router = 'token'": ("max_router_lag",) if confu and self.router == "token" else (),
            "with num_soft_prompts = 0": ("lr_prompts",) if confu and self.num_soft_prompts == 0 else (),
            "with init, whose draft brings its own vocabulary": ("draft_vocab_size",) if self.init else (),
            "without init": () if self.init else ("keep_vocabulary",),
            "with evaluate_every = 0": () if self.evaluate_every else EVAL_SETTINGS,
            "with features = 'online'": ("feature_store",) if self.features == "online" else (),
        }
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        sentences = []
        for when, names in kinds.items():
            idle = [name for name in names if getattr(self, name) != defaults[name]]
            if idle:
                sentences.append(f"{', '.join(idle)}: no effect {when}.")
        return sentences


def from_dict(cls: type[T], values: dict[str, Any], *, source: str) -> T:
    """Build a config dataclass from parsed TOML or JSON.

    Raises ValueError naming ``source`` for an unknown key (with the closest known one), a missing key or a wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(fields))}."
            raise ValueError(f"{source}: unknown key {key!r}; {hint}")
    missing = [n for n, f in fields.items() if n not in values and _is_required(f)]
    if missing:
        raise ValueError(f"{source}: missing {', '.join(missing)}; add it.")
    cast = {key: _coerce(value, hints[key], f"{source}: {key}") for key, value in values.items()}
    try:
        return cls(**cast)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def load_toml(cls: type[T], path: str | Path, overrides: dict[str, Any] | None = None) -> T:
    """Read a config from a TOML file; ``overrides`` win over the file."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"No recipe at {path}; give the path of a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from None
    return from_dict(cls, values | (overrides or {}), source=str(path))


def to_json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Accept what JSON and TOML can say for the types used above; anything else is a sentence."""
    kinds = getattr(hint, "__args__", ()) if "|" in str(hint) else (hint,)
    for kind in kinds:
        origin = getattr(kind, "__origin__", kind)
        if origin is tuple and isinstance(value, (list, tuple)):
            items = kind.__args__  # (str, ...) or a fixed number of types
            if items[-1] is Ellipsis:
                items = (items[0],) * len(value)
            if len(items) == len(value):
                return tuple(_coerce(v, item, where) for v, item in zip(value, items, strict=True))
        if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if origin is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if origin in (str, bool, dict, type(None)) and isinstance(value, origin):
            return value
    raise ValueError(f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}.")


def _one_of(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; give one of {', '.join(allowed)}.")


def _at_least(config: Any, name: str, low: float) -> None:
    value = getattr(config, name)
    if not value >= low:
        raise ValueError(f"{name} is {value}; give {low} or more.")
