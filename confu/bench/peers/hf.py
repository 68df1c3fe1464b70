"""transformers' own `generate`: plain, with prompt lookup, or assisted by a smaller model."""

import time

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList


def load(settings):
    def model_at(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, settings["dtype"]))
        return model.to(settings["device"]).eval()

    torch.set_num_threads(settings["threads"])
    model = model_at(settings["target"])
    eos = model.generation_config.eos_token_id
    options = {}
    if settings["variant"] == "lookup":  # the same chain as ours drafts
        options = {"prompt_lookup_num_tokens": settings["depth"], "max_matching_ngram_size": 3}
    extra = {"assistant_model": model_at(settings["model"])} if settings["variant"] == "assisted" else {}

    @torch.inference_mode()
    def answer(prompt, max_new_tokens, temperature, seed):
        torch.manual_seed(seed)
        sampling = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, num_beams=1, eos_token_id=eos, pad_token_id=0, **sampling, **options
        )
        rounds = Rounds()
        ids = torch.tensor([prompt], device=model.device)
        began = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([rounds]),
            **extra,
        )
        if out.device.type == "cuda":
            torch.cuda.synchronize()
        wall_seconds = time.perf_counter() - began
        # The first call also reads the prompt; it is prefill, as it is for every method.
        lengths = [after - before for before, after in zip(rounds.ends, rounds.ends[1:], strict=False)]
        return {
            "token_ids": out[0, len(prompt) :].tolist(),
            "wall_seconds": wall_seconds,
            "prefill_seconds": rounds.times[0] - began if rounds.times else 0.0,
            "round_lengths": lengths,
            "round_accepted": [length - 1 for length in lengths],
        }

    return {"transformers": transformers.__version__, "torch": torch.__version__}, answer


class Rounds(StoppingCriteria):
    """Never stops; notes where the sequence ends after every round."""

    def __init__(self):
        self.ends, self.times = [], []

    def __call__(self, input_ids, scores, **options):
        self.ends.append(input_ids.shape[1])
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
