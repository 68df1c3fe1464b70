"""What lets the frozen target say where the text is going: soft prompts, the [con] and [f] mixtures, and who sees whom.

METHOD 4. The [con] row rides behind a tree node through the target and returns the future prediction f; the [f] row
carries f into the draft's attention. Both embeddings are mixtures of experts routed by context.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from confu.config import DraftConfig
from confu.rows import rows


class Mixture(nn.Module):
    """E learnable embeddings; a linear router keeps the best K, renormalised by softmax over those K."""

    def __init__(self, width_in: int, width: int, num_experts: int, top_experts: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(num_experts, width))
        self.router = nn.Linear(width_in, num_experts, bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        self.top_experts = top_experts

    def forward(self, state: Float[Tensor, "*rows width_in"]) -> Float[Tensor, "*rows D"]:
        """Softmax over all experts, then top-K renormalised, is softmax over the K best logits."""
        return rows().mix(state, self.router.weight, self.experts, self.top_experts)


class Contemplation(nn.Module):
    """ConFu's weights beside the EAGLE-3 layer: soft prompts (target side), [con] and [f] mixtures."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        width, experts, top = config.hidden_size, config.num_experts, config.top_experts
        heads, head_dim = config.target_key_value_heads or config.num_key_value_heads, config.target_head_dim
        soft = (config.num_target_layers, heads, config.num_soft_prompts, head_dim or config.head_dim)
        self.soft_keys = nn.Parameter(torch.zeros(soft))
        self.soft_values = nn.Parameter(torch.zeros(soft))
        self.by_token, self.replication = config.router == "token", config.replication
        self.con = Mixture(width if self.by_token else 3 * width, width, experts, top)
        form = config.future_form
        if form == "row":
            self.future = Mixture(width, width, experts, top)
        elif form == "kv":
            self.future_kv = nn.Linear(3 * width, 2 * config.num_key_value_heads * config.head_dim, bias=False)
        elif form == "input":
            self.future_fc = nn.Linear(3 * width, width, bias=False)
        else:
            self.future_heads = nn.Parameter(torch.zeros(config.future_steps, width, 3 * width))

    def without_heads(self) -> Contemplation:
        """The same weights but W_j, for decoding, which has those laid out anew: they go when the network does."""
        rest = copy.copy(self)
        rest._parameters = {name: weight for name, weight in self._parameters.items() if name != "future_heads"}
        return rest

    def con_rows(self, state: Float[Tensor, "B R D3"], followed: Float[Tensor, "B C D"]) -> Float[Tensor, "B Rc D"]:
        """Embeddings of contemplate rows, routed by h of the latest accepted token (``state``: one for all rows of a
        sequence, or one each), or by the embedding of the token that each row follows."""
        return self.con(followed if self.by_token else state).to(followed.dtype)


def tree_rows_mask(ancestors: Bool[Tensor, "B N N"], con_nodes: Int[Tensor, "B C"]) -> Bool[Tensor, "B N+C N+C"]:
    """Who sees whom among the rows of one verification: N tree nodes, then one contemplate row for each of C nodes.

    A node sees its ancestors and itself, never a contemplate row; the contemplate row of node i sees what i sees and
    itself; nobody else sees it. ``ancestors[b, i, j]``: j is i or an ancestor of i.
    """
    batch, num_nodes, _ = ancestors.shape
    num_con = con_nodes.shape[1]
    con = ancestors.gather(1, con_nodes[:, :, None].expand(-1, -1, num_nodes))
    upper = nn.functional.pad(ancestors, (0, num_con))
    itself = torch.eye(num_con, dtype=torch.bool, device=ancestors.device).expand(batch, -1, -1)
    return torch.cat([upper, torch.cat([con, itself], dim=2)], dim=1)
