"""Write a target that no GGUF file can have made, to measure what one of another origin costs.

    python benchmarks/unblocked.py FOLDER
    python benchmarks/unblocked.py FOLDER --target NAME

It is the target (by default the default one) but for 32 numbers of each weight, which are moved by a hundredth, so that
its weights are kept in bfloat16 and not in blocks. It says nearly the same, and drafts serve it as well.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from confu.models import DEFAULT_TARGET, load_target_model

BLOCK = 32


def unblock(model: nn.Module) -> None:
    """Move a block of every linear layer's weight off what few bits can say."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.data.clone()  # not in the file that it may be mapped from
            weight[0, :BLOCK] *= torch.linspace(1, 1.01, BLOCK, dtype=weight.dtype, device=weight.device)
            layer.weight.data = weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to write it")
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="NAME", help="a target's name or folder")
    args = parser.parse_args()
    model, tokenizer = load_target_model(args.target, dtype=torch.bfloat16, device="cpu")
    unblock(model)
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
