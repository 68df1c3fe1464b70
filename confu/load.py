"""From names to a running `Decoder`: target, draft, dtype and device joined in one place, and prompts to token ids."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confu.config import SamplingConfig, TreeConfig
from confu.draft import DraftModel, load_draft_config
from confu.drafter import Drafter, TreeDrafter
from confu.forward import Forward, ModelForward
from confu.generate import Decoder
from confu.graphs import CudaGraphs, GraphForward, check_compile
from confu.linear import check_quantization, pack_linears
from confu.llama import LlamaForward, is_llama_like
from confu.memory import forget_mapped, return_freed_memory
from confu.models import DEFAULT_TARGET, Progress, draft_path, load_target_model
from confu.target import Target

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOOKUP = "lookup"
DRAFT_MODEL = "draft-model:"
UNREAD = (0, 0, 0)  # feature layers where no draft reads any: the embedding, which costs nothing to capture


def load_decoder(
    draft: str | None,
    *,
    target: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str | None = None,
    compile: bool = False,
    tree: TreeConfig | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Target and drafter by name, ready to decode.

    ``draft`` is a trained draft (shipped name, folder or Hub id), ``lookup``, ``draft-model:NAME`` for a smaller model
    of the same vocabulary, or None for plain decoding. The target's weights are laid out for decoding
    (`pack`), in fewer bits with ``quantization``; with ``compile``, its forwards over few rows are replayed as CUDA
    graphs (`graphs.py`).

    Raises ValueError for names, files and settings that do not fit, ModelUnavailable for what cannot be had now.
    """
    place = find_device(device)
    precision = find_dtype(dtype, place)
    name = target_name(draft, target)
    # A draft is read first: it is small, and most mistakes show there.
    check_quantization(quantization, place)
    check_compile(compile, place)
    network = read_network(draft, precision, place)
    model, tokenizer = load_target_model(name, dtype=precision, device=place, progress=progress)
    forward = pack(model, quantization, compile=compile)
    return_freed_memory()
    decoder = join(draft, network, model, forward, tokenizer, tree, progress=progress)
    del network, model  # the drafter and the forward have what decoding needs, laid out anew
    return_freed_memory()
    _record(decoder)
    return decoder


def _record(decoder: Decoder) -> None:
    """With ``compile``, what short texts need is recorded now, and not in the first answer."""
    if decoder.target.compiled:
        decoder.generate([[0, 0]], SamplingConfig(max_new_tokens=4, ignore_eos=True))


def load_target(
    name: str, *, dtype: str, device: str, progress: Progress | None = None
) -> tuple[Target, PreTrainedTokenizerBase]:
    """A target by itself, with its tokenizer, where no drafter is needed. ``device`` is one that `find_device` gave."""
    model, tokenizer = load_target_model(name, dtype=find_dtype(dtype, device), device=device, progress=progress)
    return Target(model), tokenizer


def read_network(draft: str | None, dtype: torch.dtype, device: str) -> DraftModel | None:
    """The network of a trained draft; None for what needs none."""
    if draft is None or is_untrained(draft):
        return None
    return DraftModel.load(draft_path(draft), dtype=dtype, device=device)


def pack(model: PreTrainedModel, quantization: str | None = None, *, compile: bool = False) -> Forward:
    """The model's weights laid out for decoding. The model gives its own up: it keeps embeddings and configuration.

    Raises ValueError with ``compile`` for a model whose forward cannot be recorded.
    """
    if is_llama_like(model):
        decoder: Any = model.get_decoder()
        if compile and decoder.rotary_emb.rope_type == "dynamic":
            raise ValueError(
                "The target's rotary frequencies change with the length of the text (dynamic), which no CUDA graph can "
                "follow; leave compile out."
            )
        _leave_file(model)
        forward = LlamaForward(model, quantization, release=True)
        return GraphForward(forward, CudaGraphs(model.device)) if compile else forward
    if compile:
        raise ValueError(
            f"{type(model).__name__} runs through transformers' code, which is not recorded; compile takes Llama, "
            "Mistral, Qwen2, Qwen3 and what is built like them. Leave compile out."
        )
    pack_linears(model, quantization)
    return ModelForward(model, quantization)


def _leave_file(model: PreTrainedModel) -> None:
    """Copy the norms of a Llama-like model where they are mapped from a file, and let go of its pages: each comes back
    when its weight is packed. The embedding stays there: of its rows only those that a text holds are ever read."""
    mapped = [weight.data for weight in model.parameters()]
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.clone()
    forget_mapped(mapped)


def join(
    draft: str | None,
    network: DraftModel | None,
    model: PreTrainedModel,
    forward: Forward,
    tokenizer: PreTrainedTokenizerBase,
    tree: TreeConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Decoder:
    """A loaded target and the drafter that ``draft`` names; several decoders may share one model and its forward."""
    verifier = Target(model, network.config.feature_layers if network else UNREAD, forward=forward)
    drafter: Drafter | None = None
    if network is not None:
        drafter = TreeDrafter(network, verifier)
    elif draft == LOOKUP:
        from confu.lookup import Lookup

        drafter = Lookup(verifier)
    elif draft is not None:
        from confu.assistant import Assistant

        small, _ = load_target_model(
            draft.removeprefix(DRAFT_MODEL), dtype=model.dtype, device=str(model.device), progress=progress
        )
        drafter = Assistant(verifier, Target(small, UNREAD, forward=pack(small, compile=verifier.compiled)))
    return Decoder(verifier, drafter, tokenizer, tree)


def use_tuning(decoder: Decoder, draft: str | None) -> bool:
    """Let trees be as `confu tune` found for this draft on this machine, but for a lookup that the decoder's own tree
    already says; False where it did not."""
    from confu.tune import read

    found = read(draft_path(draft), decoder) if draft is not None and not is_untrained(draft) else None
    if found is not None:
        lookup, (decoder.tree, decoder.costs) = decoder.tree.lookup, found
        if lookup is not None:
            decoder.tree = dataclasses.replace(decoder.tree, lookup=lookup)
        _record(decoder)
    return found is not None


def target_name(draft: str | None, target: str | None) -> str:
    """The target asked for, else the draft's own, else the default one."""
    if target is not None:
        return target
    if draft is None or is_untrained(draft):
        return DEFAULT_TARGET
    return load_draft_config(draft_path(draft)).target


def find_device(name: str) -> str:
    devices = available_devices()
    if name == "auto":
        return "cuda" if "cuda:0" in devices else "cpu"
    if name in devices or (name == "cuda" and "cuda:0" in devices):
        return name
    raise ValueError(f"device {name!r} is not here; give auto or one of {', '.join(devices)}.")


def available_devices() -> list[str]:
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return [*devices, "mps"] if torch.backends.mps.is_available() else devices


def find_dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if _computes_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not known; give auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation by the tokenizer's own chat template, open for the assistant's answer."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError("The target's tokenizer has no chat template; give the prompt as it is with --raw.")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"The target's chat template refuses this conversation ({error}).") from None
    # The template writes its own special tokens.
    return tokenizer.encode(str(text), add_special_tokens=False)


def encode_raw(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text without any template; the tokenizer adds its start token, if it has one."""
    return tokenizer.encode(text)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one question by the chat template, or as it is for a tokenizer without one."""
    if tokenizer.chat_template:
        return encode_chat(tokenizer, [{"role": "user", "content": text}])
    return encode_raw(tokenizer, text)


def is_untrained(draft: str) -> bool:
    return draft == LOOKUP or draft.startswith(DRAFT_MODEL)


def _computes_bfloat16(device: str) -> bool:
    """Natively, that is: emulated bfloat16 is slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # avx512_bf16 and amx_bf16 on x86, bf16 on Arm
    return device == "cpu" and any(has and "bf16" in name for name, has in torch.cpu.get_capabilities().items())
