"""The training loop: EAGLE-3 from scratch, ConFu from a trained EAGLE-3 draft (METHOD 4).

`schedule` says which conversations a step reads, `optimise` takes the step, `runs` keeps the folder. Data order and
anchors depend on seed and step alone, so a resumed run is the same run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from confu.config import TrainConfig
from confu.data.corpus import Corpus, recipe_corpus
from confu.memory import return_freed_memory, reuse_freed_memory
from confu.target import Target
from confu.training.evaluate import Evaluation, Evaluator, held_out_prompts
from confu.training.features import FeatureStore
from confu.training.optimise import Trainer
from confu.training.parallel import ALONE, World
from confu.training.runs import Interrupts, Position, Run
from confu.training.schedule import step_plan
from confu.training.start import check_needs, overruled, start_draft

Progress = Callable[[str, float | None], None]
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """One logged interval of a run."""

    step: int
    loss: float
    kl: list[float]
    accuracy: list[float]
    tokens_per_second: float
    """Supervised tokens per second of the steps."""
    tokens_seen: int


def train(
    config: TrainConfig,
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    *,
    resume: bool = False,
    world: World = ALONE,
    on_report: Callable[[Report], None] = lambda report: None,
    on_evaluation: Callable[[Evaluation], None] = lambda evaluation: None,
    progress: Progress = lambda stage, fraction: None,
    notice: Notice = lambda sentence: None,
) -> Path:
    """Run a recipe to its end; returns the folder of the trained draft. ``notice`` takes sentences for the user.

    Raises ValueError for unusable data or settings, RuntimeError naming step and documents when the loss is not finite.
    """
    check_needs(config)
    run = Run(config, resume=resume, writes=world.rank == 0)
    _check_share(config, world)
    reuse_freed_memory()
    torch.manual_seed(config.seed)

    # 1. data
    corpus = recipe_corpus(config, tokenizer, progress)
    run.check_data(corpus)
    evaluator = None
    if config.evaluate_every:
        evaluator = Evaluator(config, target, held_out_prompts(config, tokenizer, corpus, target, notice))
    # 2. draft
    draft = start_draft(config, target, corpus).to(target.device).train()
    for sentence in (*config.without_effect(), *overruled(config, draft)):
        notice(sentence)
    store = _open_store(config, corpus, target, world, notice) if config.features == "cache" else None
    trainer = Trainer(config, target, draft, corpus.documents, store, world)
    at = run.begin(trainer, corpus)
    world.agree(draft)

    # 3. loop
    try:
        _loop(trainer, run, at, evaluator, on_report, on_evaluation)
    except KeyboardInterrupt:
        run.checkpoint(trainer, at)
        raise
    finally:
        run.close()
        if store is not None:
            store.flush()

    # 4. the draft
    return run.finish(draft.eval(), at)


def _loop(
    trainer: Trainer,
    run: Run,
    at: Position,
    evaluator: Evaluator | None,
    on_report: Callable[[Report], None],
    on_evaluation: Callable[[Evaluation], None],
) -> None:
    """Take the steps that are left, with what is due between them."""
    config = trainer.config
    plan = step_plan(
        trainer.documents,
        batch_tokens=config.batch_tokens,
        accumulate=config.accumulate,
        seed=config.seed,
        start=at.step,
    )
    with Interrupts(trainer.world) as interrupts:
        while True:
            # At the top, so that a resumed run makes up for an evaluation that was interrupted.
            if evaluator is not None and run.wants_tau(at.step):
                evaluation = evaluator.evaluate(trainer.draft, at.step, at.tokens_seen)
                run.log_tau(dataclasses.asdict(evaluation), trainer.draft)
                on_evaluation(evaluation)
            if at.step == config.steps:
                return
            with interrupts.postponed():  # until the report is out, too: a resumed run does not make up for it
                began = time.perf_counter()
                at.advance(trainer.step(at.step, next(plan)), time.perf_counter() - began)
                if at.step % config.log_every == 0 or at.step == config.steps:
                    report = _summary(at)
                    at.begin_window()
                    run.log(dataclasses.asdict(report))
                    on_report(report)
                    return_freed_memory()  # else what lies between two blocks in use adds up from batch to batch
            if at.step % config.checkpoint_every == 0 and at.step < config.steps:
                run.checkpoint(trainer, at)


def _check_share(config: TrainConfig, world: World) -> None:
    if config.accumulate % world.size:
        raise ValueError(
            f"accumulate is {config.accumulate}, but {world.size} processes train together, each on its share of a "
            f"step's micro-batches; give a multiple of {world.size}."
        )


def _open_store(config: TrainConfig, corpus: Corpus, target: Target, world: World, notice: Notice) -> FeatureStore:
    folder = config.feature_store or Path(config.out) / "features"
    store = FeatureStore(folder, corpus, target, name=config.target, max_length=config.max_length)
    notice(store.describe())
    with world.first_alone():
        store.open()
    return store


def _summary(at: Position) -> Report:
    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean(0)

    return Report(
        at.step,
        mean([w.total for w in at.window]).item(),
        [round(x, 4) for x in mean([w.kl for w in at.window]).tolist()],
        [round(x, 4) for x in mean([w.accuracy for w in at.window]).tolist()],
        sum(w.num_supervised for w in at.window) / at.seconds,
        at.tokens_seen,
    )
