"""The preallocated key-value cache of target and draft: B sequences of different lengths, compacted in place.

Layout of one layer, for every sequence: S soft-prompt slots, then the sequence's own tokens. A forward over R rows
writes them behind each sequence's length; `keep` then moves the accepted ones up and forgets the rest, so a
rejected or abandoned row never has to be erased. It is a `transformers` Cache, so HF models write into it themselves.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from confu.host import upload
from confu.native import on_host


class KVCache(Cache):
    """Keys and values of ``num_layers`` layers for ``batch_size`` sequences of up to ``capacity`` tokens.

    ``lengths`` (on the host) counts the tokens kept for each sequence; only `keep`, `truncate` and `select` change it.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        num_soft: int = 0,
    ) -> None:
        super().__init__(layers=[])
        self.num_soft = num_soft
        self.capacity = capacity
        shape = (num_layers, batch_size, num_kv_heads, num_soft + capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * batch_size
        self.lent = False  # whether keys and values lie in another's store, which may be handed on (`graphs.Store`)
        # Index of each sequence. (Of all ways to write rows at places that differ by sequence, indexing alone does not
        # read the whole cache in bfloat16.)
        self._batch: Int[Tensor, "B 1"] = torch.arange(batch_size, device=device)[:, None]
        self._offset = num_soft
        self._first_slots: Int[Tensor, " B"] | None = None
        self._slots: Int[Tensor, "B R"] | slice = slice(0, 0)
        self._view = slice(0, 0)

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def whole(self) -> bool:
        """False after an interrupt in the middle of `select`."""
        return self.keys.shape[1] == self.values.shape[1] == len(self.lengths)

    @property
    def num_soft_keys(self) -> int:
        """Soft prompts among the keys that the next `update` returns."""
        return self.num_soft - self._view.start

    def lengths_tensor(self) -> Int[Tensor, " B"]:
        return upload(self.lengths, self.keys.device)

    def write_soft(
        self, keys: Float[Tensor, "L B heads S head_dim"], values: Float[Tensor, "L B heads S head_dim"]
    ) -> None:
        """Fill the soft slots (B may be 1: shared by all sequences)."""
        self.keys[:, :, :, : self.num_soft] = keys
        self.values[:, :, :, : self.num_soft] = values

    def open_rows(self, num_rows: int, *, offset: int = 0, with_soft: bool = False) -> None:
        """Choose where the next `update` of each layer writes: ``num_rows`` slots at length + ``offset``.

        ``with_soft`` makes the soft prompts the first keys of what `update` returns.
        """
        first, last = min(self.lengths), max(self.lengths)
        end = last + offset + num_rows
        if end > self.capacity:
            self.reserve(end)
        base = self._offset = self.num_soft + offset
        self._first_slots = None
        if first == last:
            self._slots = slice(base + last, base + last + num_rows)
        else:
            self._slots = self.first_slots[:, None] + torch.arange(num_rows, device=self.keys.device)
        self._view = slice(0 if with_soft else self.num_soft, self.num_soft + end)

    def copy_first_slots(self, into: Int[Tensor, " B"]) -> None:
        """Write where the opened rows begin into a tensor on the device; the host need not wait for it where all
        sequences are equally long."""
        if isinstance(self._slots, slice):
            into.fill_(self._slots.start)
        else:
            into.copy_(self.first_slots)

    @property
    def first_slots(self) -> Int[Tensor, " B"]:
        """Where the opened rows of each sequence begin; made when first asked for, since it goes to the device."""
        if self._first_slots is None:
            self._first_slots = self.lengths_tensor() + self._offset
        return self._first_slots

    def opened(self, layer_idx: int) -> tuple[Float[Tensor, "B heads K head_dim"], Float[Tensor, "B heads K head_dim"]]:
        """All keys and values of one layer up to the longest sequence's end, the opened rows included."""
        return self.keys[layer_idx, :, :, self._view], self.values[layer_idx, :, :, self._view]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the opened rows of one layer; return all keys and values up to the longest sequence's end."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if isinstance(self._slots, slice):
            keys[:, :, self._slots] = key_states
            values[:, :, self._slots] = value_states
        else:
            keys[self._batch, :, self._slots] = key_states.transpose(1, 2)
            values[self._batch, :, self._slots] = value_states.transpose(1, 2)
        return self.opened(layer_idx)

    def row_mask(self, rows: Bool[Tensor, "B R W"], *, with_soft: bool | Bool[Tensor, "B R"]) -> Bool[Tensor, "B R K"]:
        """Mask over the keys `update` returns: every row sees its sequence's prefix, and of the W rows written behind
        it those that ``rows`` allows. ``with_soft`` says which rows see the soft prompts (False: they are not keys).
        """
        device, width = rows.device, rows.shape[2]
        longest = max(self.lengths)
        if longest == min(self.lengths):
            mask = torch.nn.functional.pad(rows, (longest, 0), value=True)
        else:
            lengths = self.lengths_tensor()
            prefix = torch.arange(longest + width, device=device) < lengths[:, None]
            mask = prefix[:, None, :].repeat(1, rows.shape[1], 1)
            slots = lengths[:, None] + torch.arange(width, device=device)
            mask.scatter_(2, slots[:, None, :].expand_as(rows), rows)
        if isinstance(with_soft, Tensor):
            mask = torch.cat([with_soft[:, :, None].expand(-1, -1, self.num_soft), mask], dim=2)
        return mask

    def keep(self, path: Int[Tensor, "B M"], counts: list[int]) -> None:
        """Keep the first ``counts[b]`` of the rows ``path[b]`` (ascending indices into the rows just written); drop the
        others."""
        if path.shape[1] == 1:  # the root, which lies in place
            self.advance(counts)
            return
        whole = self.keys.is_contiguous() and self.values.is_contiguous() and self.keys.is_cpu
        if whole and (move := on_host("keep_rows", 3, 6, path)) is not None:
            outer, batch, inner, slots, width = self.keys.shape
            path, first = path.contiguous(), self.lengths_tensor() + self.num_soft
            for store in (self.keys, self.values):
                row_bytes = width * store.element_size()
                pointers = map(torch.Tensor.data_ptr, (store, path, first))
                move(*pointers, outer, batch, inner, slots, row_bytes, path.shape[1])
            self.advance(counts)
            return
        steps = torch.arange(path.shape[1], device=path.device)
        base = (self.lengths_tensor() + self.num_soft)[:, None]
        source, target = base + path, base + steps
        for store in (self.keys, self.values):
            store[:, self._batch, :, target] = store[:, self._batch, :, source]
        self.advance(counts)

    def advance(self, counts: list[int]) -> None:
        """Keep the first ``counts[b]`` of the rows just written, which lie in place already (prefill)."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def truncate(self, lengths: list[int]) -> None:
        """Forget all but the first ``lengths[b]`` tokens of each sequence."""
        for new, old in zip(lengths, self.lengths, strict=True):
            if not 0 <= new <= old:
                raise ValueError(f"Cannot cut a cache of {old} tokens to {new}; give 0 to {old}.")
        self.lengths = list(lengths)

    def select(self, sequences: list[int]) -> None:
        """Keep only these sequences of the batch, in this order."""
        index = upload(sequences, self.keys.device)
        lengths, self.lengths = [self.lengths[i] for i in sequences], []
        if self.lent:
            self.keys, self.values = self.keys.index_select(1, index), self.values.index_select(1, index)
            self.lent = False
        else:
            used = self.num_soft + max(lengths, default=0)
            self.keys, self.values = (_closed_up(store, index, used) for store in (self.keys, self.values))
        self.lengths = lengths
        self._batch = self._batch[: len(sequences)]

    def reserve(self, capacity: int) -> None:
        """Grow to at least ``capacity`` tokens, by half of what there was at least, so that growing stays rare."""
        if capacity <= self.capacity:
            return
        capacity = max(capacity, self.capacity * 3 // 2)
        extra = capacity - self.capacity
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra))
        self.capacity, self.lent = capacity, False


def _closed_up(
    store: Float[Tensor, "L B heads K head_dim"], index: Int[Tensor, " kept"], used: int
) -> Float[Tensor, "L kept heads K head_dim"]:
    """These sequences at the front of the store that holds them, layer behind layer. Fresh memory for all slots would
    cost more than the tokens do; sequences move forward only, so none is overwritten before it has moved."""
    shape = store.shape[0], len(index), *store.shape[2:]
    closed = store.view(-1)[: math.prod(shape)].view(shape)
    for layer in range(len(store)):
        closed[layer, :, :, :used] = store[layer, :, :, :used].index_select(0, index)
    return closed


class PrefixCache(Cache):
    """Constant keys and values of a prefix before the rows of one differentiable forward (training of soft prompts).

    ``soft_keys`` and ``soft_values`` carry gradient; the prefix does not. Nothing is stored.
    """

    def __init__(
        self,
        prefix: KVCache,
        soft_keys: Float[Tensor, "L heads S head_dim"],
        soft_values: Float[Tensor, "L heads S head_dim"],
    ) -> None:
        super().__init__(layers=[])
        self.prefix, self.soft_keys, self.soft_values = prefix, soft_keys, soft_values
        self.num_soft_keys = soft_keys.shape[2]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        end = max(self.prefix.lengths)
        batch = key_states.shape[0]

        def join(soft: Tensor, kept: Tensor, new: Tensor) -> Tensor:
            start = self.prefix.num_soft
            return torch.cat(
                [
                    soft[layer_idx].to(new.dtype).expand(batch, -1, -1, -1),
                    kept[layer_idx][:, :, start : start + end],
                    new,
                ],
                dim=2,
            )

        return (
            join(self.soft_keys, self.prefix.keys, key_states),
            join(self.soft_values, self.prefix.values, value_states),
        )
