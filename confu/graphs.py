"""`--compile`: forwards over few rows recorded as CUDA graphs, and replayed.

A small model on a GPU waits for its kernels to be launched, some hundreds a forward. A graph launches them all at once,
but only for the shapes and addresses that it was recorded with. So rows, sequences and slots of the cache are rounded
up to a short list of sizes, and a cache moves into a `Store`, whose address stays: a request takes the store that an
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

Run = Callable[[], tuple[Tensor, ...]]
Record = Callable[[Run], Run]
"""From a function to one that does the same again with the same tensors."""

MOST_ROWS = 256  # of all sequences together: with more, kernels take longer than their launches
MOST_UNREAD = 16  # rows without logits: more are a piece of a prompt, and its length may never come again
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

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return out

        return replay


class Store:
    """Keys and values that outlive the caches which lie in them, one after the other."""

    def __init__(self, like: KVCache, batch_size: int, num_slots: int) -> None:
        self.shape = batch_size, num_slots
        self.kv = FixedCache(like, batch_size, num_slots)
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
        num_slots = self.shape[1]
        kept = min(cache.keys.shape[3], num_slots)
        with torch.inference_mode(False), torch.no_grad():
            keys, values = (here[:, : cache.batch_size] for here in (self.kv.keys, self.kv.values))
            for here, there in ((keys, cache.keys), (values, cache.values)):
                here[:, :, :, :kept] = there[:, :, :, :kept]
                here[:, :, :, kept:] = 0
            self.kv.starts.fill_(cache.num_soft)  # sequences beyond this batch must not write past the end
        self._given, self._owner = (keys, values), weakref.ref(cache)
        cache.keys, cache.values, cache.capacity = keys, values, num_slots - cache.num_soft
        cache.lent = True


class FixedCache(KVCache):
    """The cache as a recording sees it: a tensor on the device says where the rows of each sequence begin, and all
    slots are keys."""

    def __init__(self, like: KVCache, batch_size: int, num_slots: int) -> None:
        num_layers, _, num_heads, _, head_dim = like.keys.shape
        shape = num_layers, batch_size, num_heads, num_slots - like.num_soft, head_dim
        with torch.inference_mode(False):  # written by callers inside and outside of inference mode
            super().__init__(*shape, dtype=like.dtype, device=like.keys.device, num_soft=like.num_soft)
            self.starts = torch.full((batch_size,), like.num_soft, device=like.keys.device)

    def lengths_tensor(self) -> Int[Tensor, " B"]:
        return self.starts - self.num_soft

    def open_rows(self, num_rows: int, *, offset: int = 0, with_soft: bool = False) -> None:
        self._first_slots = self.starts + offset
        self._slots = self._first_slots[:, None] + torch.arange(num_rows, device=self.starts.device)
        self._view = slice(0, self.keys.shape[3])

    def row_mask(self, rows: Bool[Tensor, "B R W"], *, with_soft: bool | Bool[Tensor, "B R"]) -> Bool[Tensor, "B R K"]:
        slots = torch.arange(self.keys.shape[3], device=rows.device)
        prefix = (slots >= self.num_soft) & (slots < self.starts[:, None])
        mask = prefix[:, None].repeat(1, rows.shape[1], 1)
        if isinstance(with_soft, Tensor):
            mask |= with_soft[:, :, None] & (slots < self.num_soft)
        behind = self.starts[:, None] + torch.arange(rows.shape[2], device=rows.device)
        return mask.scatter(2, behind[:, None].expand_as(rows), rows)


class Recorded:
    """A function of tensors that stay where they are, recorded when it is first called."""

    def __init__(self, run: Run, record: Record) -> None:
        self._do: Run | None = None
        self._record = record
        # It refers to what refers to this; so it goes when recorded, and a graph's memory with its last user.
        self._run: Run | None = run

    def __call__(self) -> tuple[Tensor, ...]:
        if self._run is not None:
            self._do, self._run = self._record(self._run), None
        assert self._do is not None
        return self._do()


class Recordings:
    """The stores and graphs of one network; those that were used last are kept."""

    def __init__(self) -> None:
        self.stores: list[Store] = []
        self.graphs: dict[Any, Any] = {}

    def store(self, cache: KVCache, num_slots: int) -> Store:
        """The store that ``cache`` lies in, once it was moved into a free or a new one where it must."""
        home = next((store for store in self.stores if store.holds(cache)), None)
        if home is None or home.shape[1] < num_slots:
            shape = rounded_up(cache.batch_size), rounded_up(num_slots, LEAST_SLOTS)
            free = (store for store in self.stores if store.shape == shape and not store.taken)
            home = next(free, None) or Store(cache, *shape)
            home.take_in(cache)
        self.stores = [*(store for store in self.stores if store is not home), home]
        if len(self.stores) > MOST_STORES:  # a cache in it keeps the memory, and moves when it is next used
            dropped = self.stores.pop(0)
            self.graphs = {key: graph for key, graph in self.graphs.items() if key[0] is not dropped}
        return home

    def graph(self, store: Store, shape: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The graph of a store for ``shape``; one just made where there is none."""
        graph = self.graphs.pop((store, *shape), None) or make()
        self.graphs[store, *shape] = graph
        if len(self.graphs) > MOST_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        return graph


class GraphForward:
    """Runs ``forward`` by recordings where rows are few and attend to a `KVCache`, else as it is."""

    def __init__(self, forward: Forward, record: Record) -> None:
        self.forward, self.record, self.quantization = forward, record, forward.quantization
        self.most_rows = forward.most_rows
        self.recordings = Recordings()

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
        few = 0 < rounded_up(batch) * wide <= MOST_ROWS and (num_logits > 0 or wide <= MOST_UNREAD)
        if mask is None or not few or not isinstance(cache, KVCache):
            return self.forward(embeddings, positions, mask, cache, layers, num_logits=num_logits)
        first_key = cache.num_soft - cache.num_soft_keys
        store = self.recordings.store(cache, first_key + mask.shape[2] - num_rows + wide)
        shape = wide, rounded_up(num_logits), layers
        graph = self.recordings.graph(store, shape, lambda: _RecordedRows(self, store, *shape, embeddings))
        graph.load(embeddings, positions, mask, first_key)
        cache.copy_first_slots(store.kv.starts[:batch])
        logits, states = graph.recorded()
        # Copies: the next replay writes the same tensors.
        return logits[:batch, :num_logits].clone(), states[:batch, :num_rows].clone()


class _RecordedRows:
    """One recorded forward and the tensors that it reads. Rows beyond those asked for write behind them, where nothing
    is kept; sequences beyond, where nobody reads."""

    def __init__(
        self,
        owner: GraphForward,
        store: Store,
        num_rows: int,
        num_logits: int,
        layers: tuple[int, ...],
        like: Float[Tensor, "B R D"],
    ) -> None:
        (batch, num_keys), device = store.shape, like.device
        with torch.inference_mode(False):
            self.embeddings = torch.zeros(batch, num_rows, like.shape[2], dtype=like.dtype, device=device)
            self.positions = torch.zeros(batch, num_rows, dtype=torch.int64, device=device)
            self.mask = torch.zeros(batch, num_rows, num_keys, dtype=torch.bool, device=device)
            self.mask[:, :, 0] = True  # a row that sees nothing would be NaN

        def run() -> tuple[Tensor, ...]:
            store.kv.open_rows(num_rows)
            return owner.forward(self.embeddings, self.positions, self.mask, store.kv, layers, num_logits=num_logits)

        self.recorded = Recorded(run, owner.record)

    def load(
        self,
        embeddings: Float[Tensor, "B R D"],
        positions: Int[Tensor, "B R"],
        mask: Bool[Tensor, "B R K"],
        first_key: int,
    ) -> None:
        """Say what the next run reads; the first of the keys that ``mask`` tells of lies in slot ``first_key``."""
        batch, num_rows = positions.shape
        self.embeddings[:batch, :num_rows] = embeddings
        self.positions[:batch, :num_rows] = positions
        seen = self.mask[:batch, :num_rows]  # other rows go on seeing what they saw before
        seen.zero_()
        seen[:, :, first_key : first_key + mask.shape[2]] = mask
