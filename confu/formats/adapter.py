"""The door into transformers: `model.generate(..., custom_generate=...)` decodes through a draft.

`generate` has prepared everything by then: the prompt, every logits processor and every stopping criterion. Here each
tree node is processed with its own prefix, and the criteria look at each accepted token in turn, so that both see
exactly what they see in token-by-token decoding.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin
from transformers.generation.logits_process import (
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from confu.config import SamplingConfig
from confu.generate import Decoder
from confu.stats import Stats
from confu.tree import Tree
from confu.verify import Sampler, invert_cdf

ROW_BY_ROW = (
    *(TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, LogitNormalization),
    *(RepetitionPenaltyLogitsProcessor, NoRepeatNGramLogitsProcessor, SequenceBiasLogitsProcessor),
    *(MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor),
)
"""Processors that treat every row alike, whatever batch it stands in. Others may know the batch they were made for:
its size, its padding, the index of a sequence."""
STATEFUL = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
"""What `generate` prepares for a model's forward, and the decoder makes for itself."""


class ProcessedSampler(Sampler):
    """Draws as transformers does: processors on every node's own prefix, then argmax, or a draw from torch's global
    generator, which ``torch.manual_seed`` seeds."""

    def __init__(
        self, processors: LogitsProcessorList, prefixes: list[list[int]], *, greedy: bool, padded: bool = False
    ) -> None:
        self.processors, self.greedy = processors, greedy
        self.prefixes = prefixes
        """Each sequence's tokens up to the root of its next tree; whoever reads the stream appends them."""
        self.sequences = list(range(len(prefixes)))
        self.num_sequences = len(prefixes)
        self.one_by_one = padded or not all(isinstance(processor, ROW_BY_ROW) for processor in processors)

    def select(self, sequences: list[int]) -> None:
        self.prefixes = [self.prefixes[i] for i in sequences]
        self.sequences = [self.sequences[i] for i in sequences]

    def advance(self, counts: list[int]) -> None:
        """Nothing is drawn ahead."""

    def draw(
        self, logits: Float[Tensor, "B N V"], tree: Tree, seen: Bool[Tensor, "B V"] | None = None
    ) -> Int[Tensor, "B N"]:
        scores = self._process(logits, tree) if self.processors else logits
        if self.greedy:
            return scores.argmax(dim=-1)
        probs = scores.softmax(dim=-1)
        return invert_cdf(probs, torch.rand(probs.shape[:2], dtype=torch.float64).to(probs.device))

    def _process(self, logits: Float[Tensor, "B N V"], tree: Tree) -> Float[Tensor, "B N V"]:
        """Nodes of one depth have prefixes of one length and are a batch of their own. Processors that may know the
        batch get one node at a time, as every sequence of it, and the right one's row is taken."""
        scores = logits.clone()
        for row, prefix in enumerate(self.prefixes):
            known = torch.tensor(prefix, device=logits.device)
            for depth in range(int(tree.depths[row].max()) + 1):
                nodes = ((tree.depths[row] == depth) & tree.valid[row]).nonzero()[:, 0]
                for group in nodes.split(1 if self.one_by_one else max(len(nodes), 1)):
                    path = tree.ancestors[row, group].nonzero()[:, 1].view(len(group), depth + 1)[:, 1:]
                    ids = torch.cat([known.expand(len(group), -1), tree.tokens[row][path]], dim=1)
                    if self.one_by_one:
                        copies = (x.repeat(self.num_sequences, 1) for x in (ids, logits[row, group]))
                        scores[row, group] = self.processors(*copies)[self.sequences[row]]  # type: ignore[bad-argument-type]
                    else:
                        scores[row, group] = self.processors(ids, logits[row, group])  # type: ignore[bad-argument-type]
        return scores


def decode(
    decoder: Decoder,
    input_ids: Int[Tensor, "B T"],
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any,
    stats: Stats,
    prepared: dict[str, Any],
) -> Tensor | GenerateDecoderOnlyOutput:
    """What `generate` returns: prompts and answers [B, T + new], padded at the right.

    Raises ValueError for what a tree cannot serve: beams, scores, processors with a state, a filled cache, other inputs
    than tokens.
    """
    _refuse(logits_processor, generation_config, prepared)
    texts: list[list[int]] = input_ids.tolist()  # padded prompts and answers, as processors and criteria know them
    mask = prepared.get("attention_mask")
    kept = (torch.ones_like(input_ids) if mask is None else mask).bool()
    prompts = [row[own].tolist() for row, own in zip(input_ids, kept, strict=True)]
    sampler = ProcessedSampler(
        logits_processor,
        [list(text) for text in texts],
        greedy=not generation_config.do_sample,
        padded=not bool(kept.all()),
    )
    drawn = sampler.prefixes
    running = set(range(len(texts)))
    room = max((generation_config.max_length or input_ids.shape[1] + 1) - input_ids.shape[1], 1)
    sampling = SamplingConfig(max_new_tokens=room, ignore_eos=True)
    streamer = streamer or _streamer_of_caller()

    for token in decoder.stream(prompts, sampling, sampler=sampler, stats=stats):
        drawn[token.sequence].append(token.id)  # also after its end: the tree still grows there
        if token.sequence not in running:
            continue
        text = texts[token.sequence]
        text.append(token.id)
        if streamer is not None:
            streamer.put(torch.tensor([token.id]))
        ids = torch.tensor([text], device=input_ids.device)
        if token.finish_reason or bool(stopping_criteria(ids, None)):  # type: ignore[bad-argument-type]
            running.discard(token.sequence)
        if not running:
            break
    if streamer is not None:
        streamer.end()

    longest = max(map(len, texts))
    pad = _pad_id(generation_config)
    sequences = torch.tensor([[*text, *[pad] * (longest - len(text))] for text in texts], device=input_ids.device)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[bad-argument-type]
    return sequences


def _refuse(processors: LogitsProcessorList, config: GenerationConfig, prepared: dict[str, Any]) -> None:
    if config.num_beams and config.num_beams > 1:
        raise ValueError(f"num_beams is {config.num_beams}; a draft decodes one path, so leave it at 1.")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ValueError(f"{name} is not available with a draft; leave it out.")
    for processor in processors:
        if isinstance(processor, STATEFUL):
            raise ValueError(
                f"{type(processor).__name__} keeps a state from token to token, which cannot follow the branches of a "
                "tree; leave it out, or decode without a draft."
            )
    if foreign := sorted(name for name, value in prepared.items() if value is not None and name not in PREPARED):
        raise ValueError(f"{', '.join(foreign)} cannot be used with a draft, which reads tokens only; leave it out.")
    cache = prepared.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("past_key_values holds tokens already; a draft needs the whole prompt and a cache of its own.")


def _pad_id(config: GenerationConfig) -> int:
    ids = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    return (ids[0] if isinstance(ids, list) else ids) or 0


def _streamer_of_caller() -> Any:
    """transformers 5.23 shows its streamer the prompt, but does not hand it to a custom function; waiting for an end
    that never comes would block whoever reads it."""
    frame = inspect.currentframe()
    generate = inspect.unwrap(GenerationMixin.generate).__code__
    while frame is not None and frame.f_code is not generate:
        frame = frame.f_back
    return frame.f_locals.get("streamer") if frame is not None else None
