"""Positions are turned as the model's own rotary embedding turns them, bit for bit."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from confu.cache import KVCache
from confu.turns import FIXED, Turns

OPTIONS = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"factor": 2.0},
}


def rotary(kind: str) -> LlamaRotaryEmbedding:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **OPTIONS[kind]}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256}
    return LlamaRotaryEmbedding(LlamaConfig(rope_parameters=rope, **sizes))


class Heard:
    """A rotary embedding that notes what it was asked for."""

    def __init__(self, kind: str) -> None:
        self.rotary, self.rope_type, self.sizes = rotary(kind), kind, []

    def __call__(self, x, positions):
        self.sizes.append(positions.shape)
        return self.rotary(x, positions)


def cache_of(*lengths: int, capacity: int = 40) -> KVCache:
    cache = KVCache(1, len(lengths), 1, capacity, 16, dtype=torch.float32, device="cpu")
    cache.lengths = list(lengths)
    return cache


@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looked_up_is_computed(kind, dtype):
    heard = Heard(kind)
    turns = Turns(heard)
    for lengths, ahead in (([3, 30], 5), ([39, 1], 1), ([200, 7], 30), ([0], 1)):
        x = torch.zeros(len(lengths), ahead, 64, dtype=dtype)
        positions = torch.tensor(lengths)[:, None] + torch.arange(ahead)
        ours = turns(x, positions, cache_of(*lengths), ahead)
        for a, b in zip(ours, rotary(kind)(x, positions), strict=True):
            assert a.dtype == dtype
            assert torch.equal(a, b)
    assert heard.sizes == [(1, 40), (1, 230)]  # made twice, as far as a cache reached


def test_a_table_is_of_one_type():
    heard = Heard("default")
    turns, positions = Turns(heard), torch.tensor([[1, 2]])
    for dtype in (torch.float32, torch.bfloat16):
        assert turns(torch.zeros(1, 2, 64, dtype=dtype), positions, cache_of(1), 2)[0].dtype == dtype
    assert len(heard.sizes) == 2


def test_what_depends_on_the_length_is_computed():
    heard = Heard("dynamic")
    turns, positions = Turns(heard), torch.tensor([[1, 2]])
    for _ in range(2):
        turns(torch.zeros(1, 2, 64), positions, cache_of(1), 2)
    assert heard.sizes == [(1, 2)] * 2
