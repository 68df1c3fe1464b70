"""A draft as the Hub and transformers know one: `from_pretrained`, `save_pretrained`, `push_to_hub`, and `decode` for
`model.generate(..., custom_generate=draft.decode)`.

The repository it writes also decodes by itself: its ``custom_generate/generate.py`` is what
`model.generate(..., custom_generate="org/draft", trust_remote_code=True)` runs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from confu import __version__
from confu.config import DraftConfig, TreeConfig
from confu.draft import DraftModel, stored_dtype
from confu.drafter import TreeDrafter
from confu.formats.adapter import decode
from confu.generate import Decoder
from confu.models import draft_path
from confu.stats import Stats
from confu.target import Target
from confu.training.card import write_card

BESIDE = ("README.md", "provenance.json")
GENERATE = '''"""Run by `model.generate(..., custom_generate={name!r}, trust_remote_code=True)`."""

import functools

from confu.formats.hub import ConFuDraft

load = functools.cache(ConFuDraft.from_pretrained)


def generate(model, draft={name!r}, **arguments):
    return model.generate(custom_generate=load(draft).decode, **arguments)
'''


class ConFuDraft:
    """A trained draft, EAGLE-3 or ConFu, that speeds up the `generate` of its target."""

    def __init__(
        self, model: DraftModel, *, dtype: torch.dtype = torch.bfloat16, beside: Mapping[str, str] | None = None
    ) -> None:
        self.model, self.dtype = model, dtype
        self.beside = dict(beside or {})
        """Texts that travel with the weights, by file name."""
        self.stats = Stats()
        """Of the latest `decode`."""
        self._joined: tuple[PreTrainedModel, Decoder] | None = None

    @property
    def config(self) -> DraftConfig:
        return self.model.config

    @classmethod
    def from_pretrained(cls, name_or_path: str) -> ConFuDraft:
        """A shipped draft, a folder or a Hub id. Raises ValueError for a missing, corrupt or foreign file."""
        folder = draft_path(name_or_path)
        texts = {name: folder / name for name in BESIDE if (folder / name).exists()}
        beside = {name: path.read_text(encoding="utf-8") for name, path in texts.items()}
        return cls(DraftModel.load(folder), dtype=stored_dtype(folder), beside=beside)

    def save_pretrained(self, folder: str | Path, *, repo_id: str | None = None) -> None:
        """Write weights, settings, model card and ``custom_generate``. ``repo_id`` is the Hub id under which the folder
        will be found; without it, this folder's own path is."""
        folder = Path(folder)
        self.model.save(folder, dtype=self.dtype)
        name = repo_id or str(folder.resolve())
        code = {
            "custom_generate/generate.py": GENERATE.format(name=name),
            "custom_generate/requirements.txt": f"confu-decoding>={__version__}\n",
        }
        (folder / "custom_generate").mkdir(exist_ok=True)
        for file, text in (self.beside | code).items():
            (folder / file).write_text(text, encoding="utf-8")
        if "README.md" not in self.beside:
            write_card(folder)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes; returns the address of the commit."""
        from huggingface_hub import HfApi

        hub = HfApi(token=token)
        hub.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as name:
            folder = Path(name) / repo_id.split("/")[-1]  # the card takes its title from it
            self.save_pretrained(folder, repo_id=repo_id)
            return hub.upload_folder(repo_id=repo_id, folder_path=folder).commit_url

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        tree: TreeConfig | None = None,
        streamer: Any = None,
        **prepared: Any,
    ) -> Any:
        """For ``model.generate(**inputs, custom_generate=draft.decode)``; ``tree`` is the one argument of its own.

        Raises ValueError for another target than the draft's, and for what a draft cannot serve (`adapter.decode`).
        """
        decoder = self._join(model)
        decoder.tree = tree or TreeConfig()
        self.stats = Stats()
        return decode(
            decoder,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            streamer=streamer,
            stats=self.stats,
            prepared=prepared,
        )

    def _join(self, model: PreTrainedModel) -> Decoder:
        """The decoder for this model, made on first use; weights then take its dtype and device."""
        if self._joined is None or self._joined[0] is not model:
            target = Target(model, self.config.feature_layers)
            network = copy.deepcopy(self.model).to(device=target.device, dtype=target.dtype).eval()
            self._joined = model, Decoder(target, TreeDrafter(network, target))
        return self._joined[1]
