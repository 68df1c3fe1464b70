"""EAGLE-3 drafts in other tools' files: `reading.import_draft` and `writing.export_draft`.

What the formats share is METHOD 3: one decoder layer, `fc`, `norm`, `lm_head`, and the vocabulary map `d2t`, `t2d`.
They differ in the layer's prefix, in where their settings stand, and in how they count the target's layers:

| format      | layer       | target layers                            | settings                           |
|-------------|-------------|------------------------------------------|------------------------------------|
| eagle       | `midlayer.` | not stored: 2, L//2, L-3                 | top level                          |
| specforge   | `midlayer.` | `eagle_config`, outputs from 0           | top level                          |
| modelopt    | `layers.0.` | `eagle_config`, outputs from 0           | top level, flags in `eagle_config` |
| speculators | `layers.0.` | top level, inputs (0 is the embedding)   | `transformer_layer_config`         |
| vllm        | `midlayer.` | top level, inputs                        | top level                          |
| sglang      | `midlayer.` | `eagle_config`, outputs from 0           | top level                          |

Input i of this table is output i - 1 of the layer before: the same tensor. Drafts of this package count inputs.
"""

from __future__ import annotations

from pathlib import Path

FORMATS = ("eagle", "specforge", "speculators", "vllm", "sglang")
"""What `export_draft` writes."""

LAYER = "midlayer."
OTHER_LAYER = "layers.0."
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"

WEIGHTS = (
    "fc.weight",
    "midlayer.hidden_norm.weight",
    "midlayer.input_layernorm.weight",
    "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.k_proj.weight",
    "midlayer.self_attn.v_proj.weight",
    "midlayer.self_attn.o_proj.weight",
    "midlayer.post_attention_layernorm.weight",
    "midlayer.mlp.gate_proj.weight",
    "midlayer.mlp.up_proj.weight",
    "midlayer.mlp.down_proj.weight",
    "norm.weight",
    "lm_head.weight",
)
"""Every weight of an EAGLE-3 draft, as this package and most formats name it; the vocabulary map comes beside them."""


def refuse_filled(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; name a new folder.")
