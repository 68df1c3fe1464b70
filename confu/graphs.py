"""`--compile`: forwards over few rows recorded as CUDA graphs, and replayed.

A small model on a GPU waits for its kernels to be launched, some hundreds a forward. A graph launches them all at once,
but only for the shapes and addresses that it was recorded with. So rows, sequences and slots of the cache are rounded
up to a short list of sizes, and a cache moves into a `_Store`, whose address stays: a request takes the store that an
earlier one has left, and with it its graphs.

Shapes: B batch, R rows, D hidden width, V vocabulary, K keys.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from confu.cache import KVCache, PrefixCache
from confu.forward import Forward

Run = Callable[[], tuple[Tensor, Tensor]]
Record = Callable[[Run], Run]
"""From a function to one that does the same again with the same tensors."""

MOST_ROWS = 256  # of all sequences together: with more, kernels take longer than their launches
LEAST_SLOTS = 512
MOST_STORES = 8
MOST_GRAPHS = 32
WARM_UPS = 2  # runs before a recording, in which libraries choose kernels and take their work space


def check_compile(compile: bool, device: torch.device | str) -> None:
    """Raise ValueError where ``compile`` would do nothing."""
    if compile and torch.device(device).type != "cuda":
        raise ValueError(
            f"compile records CUDA graphs, but the device is {device}, where it could not make anything faster; give a "
            "CUDA device, or leave compile out."
        )


def rounded_up(count: int, least: int = 1) -> int:
    """``count`` as the next power of two or three times one, ``least`` at least; 0 stays."""
    if count <= least:
        return least if count else 0
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


class CudaGraphs:
    """Records on one device. All recordings share their scratch memory, for they never run side by side."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                out = run()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return out

        return replay


class GraphForward:
    """Runs ``forward`` by recordings where rows are few and attend to a `KVCache`, else as it is."""

    def __init__(self, forward: Forward, record: Record) -> None:
        self.forward, self.record, self.quantization = forward, record, forward.quantization
        self._stores: list[_Store] = []  # the one used last comes last
        self._graphs: dict[Any, _Graph] = {}  # here, too

    def __call__(
        self,
        embeddings: Float[Tensor, "B R D"],
        positions: Int[Tensor, "B R"],
        mask: Bool[Tensor, "B R K"] | None,
        cache: KVCache | PrefixCache,
        layers: tuple[int, ...],
        *,
        num_logits: int,
    ) -> tuple[Float[Tensor, "B num_logits V"], Float[Tensor, "B R Dlayers"]]:
        batch, num_rows = positions.shape
        wide = rounded_up(num_rows)
        if mask is None or not isinstance(cache, KVCache) or not 0 < rounded_up(batch) * wide <= MOST_ROWS:
            return self.forward(embeddings, positions, mask, cache, layers, num_logits=num_logits)
        first_key = cache.num_soft - cache.num_soft_keys
        store = self._home(cache, first_key + mask.shape[2] - num_rows + wide)
        key = store, wide, rounded_up(num_logits), layers
        graph = self._graphs.pop(key, None) or _Graph(self.forward, *key, embeddings)
        self._graphs[key] = graph
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        graph.load(embeddings, positions, mask, cache, first_key)
        logits, states = graph.run(self.record)
        # Copies: the next replay writes the same tensors.
        return logits[:batch, :num_logits].clone(), states[:batch, :num_rows].clone()

    def _home(self, cache: KVCache, num_slots: int) -> _Store:
        """The store that ``cache`` lies in, once it was moved into a free or a new one where it must."""
        home = next((store for store in self._stores if store.holds(cache)), None)
        if home is None or home.kv.capacity < num_slots:
            shape = rounded_up(cache.batch_size), rounded_up(num_slots, LEAST_SLOTS)
            free = (store for store in self._stores if store.shape == shape and not store.taken)
            home = next(free, None) or _Store(cache, *shape)
            home.take_in(cache)
        self._stores = [*(store for store in self._stores if store is not home), home]
        if len(self._stores) > MOST_STORES:  # a cache in it keeps the memory, and moves when it is next used
            dropped = self._stores.pop(0)
            self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] is not dropped}
        return home


class _Store:
    """Keys and values that outlive the caches which lie in them, one after the other."""

    def __init__(self, like: KVCache, batch_size: int, num_slots: int) -> None:
        num_layers, _, num_heads, _, head_dim = like.keys.shape
        self.shape = batch_size, num_slots
        with torch.inference_mode(False):  # written by callers inside and outside of inference mode
            self.kv = KVCache(
                num_layers, batch_size, num_heads, num_slots, head_dim, dtype=like.dtype, device=like.keys.device
            )
        self._given: tuple[Tensor, Tensor] | None = None
        self._owner: Callable[[], KVCache | None] = lambda: None

    def holds(self, cache: KVCache) -> bool:
        """Whether ``cache`` lies here. It leaves by growing, by dropping sequences and by its end."""
        mine = self._given
        return self._owner() is cache and mine is not None and cache.keys is mine[0] and cache.values is mine[1]

    @property
    def taken(self) -> bool:
        owner = self._owner()
        return owner is not None and self.holds(owner)

    def take_in(self, cache: KVCache) -> None:
        """Move keys and values of ``cache`` here; what lies behind them is zero, as in a new cache."""
        kept = min(cache.keys.shape[3], self.kv.capacity)
        with torch.inference_mode(False), torch.no_grad():
            keys, values = (here[:, : cache.batch_size] for here in (self.kv.keys, self.kv.values))
            for here, there in ((keys, cache.keys), (values, cache.values)):
                here[:, :, :, :kept] = there[:, :, :, :kept]
                here[:, :, :, kept:] = 0
        self._given, self._owner = (keys, values), weakref.ref(cache)
        cache.keys, cache.values, cache.capacity = keys, values, self.kv.capacity - cache.num_soft


class _Graph:
    """One recorded forward and the tensors that it reads. Rows beyond those asked for write behind them, where nothing
    is kept; sequences beyond, where nobody reads."""

    def __init__(
        self,
        forward: Forward,
        store: _Store,
        num_rows: int,
        num_logits: int,
        layers: tuple[int, ...],
        like: Float[Tensor, "B R D"],
    ) -> None:
        self._forward, self._kv, self._num_logits, self._layers = forward, store.kv, num_logits, layers
        (batch, num_keys), device = store.shape, like.device
        with torch.inference_mode(False):
            self.embeddings = torch.zeros(batch, num_rows, like.shape[2], dtype=like.dtype, device=device)
            self.positions = torch.zeros(batch, num_rows, dtype=torch.int64, device=device)
            self.mask = torch.zeros(batch, num_rows, num_keys, dtype=torch.bool, device=device)
            self.first_slots = torch.zeros(batch, dtype=torch.int64, device=device)
            self.mask[:, :, 0] = True  # a row that sees nothing would be NaN
        self._replay: Run | None = None

    def load(
        self,
        embeddings: Float[Tensor, "B R D"],
        positions: Int[Tensor, "B R"],
        mask: Bool[Tensor, "B R K"],
        cache: KVCache,
        first_key: int,
    ) -> None:
        """Say what the next run reads; the first of the keys that ``mask`` tells of lies in slot ``first_key``."""
        batch, num_rows = positions.shape
        self.embeddings[:batch, :num_rows] = embeddings
        self.positions[:batch, :num_rows] = positions
        seen = self.mask[:batch, :num_rows]  # other rows go on seeing what they saw before
        seen.zero_()
        seen[:, :, first_key : first_key + mask.shape[2]] = mask
        cache.copy_first_slots(self.first_slots[:batch])

    def run(self, record: Record) -> tuple[Tensor, Tensor]:
        if self._replay is None:
            self._replay = record(self._run)
        return self._replay()

    def _run(self) -> tuple[Tensor, Tensor]:
        self._kv.open_at(self.first_slots, self.embeddings.shape[1])
        return self._forward(
            self.embeddings, self.positions, self.mask, self._kv, self._layers, num_logits=self._num_logits
        )
