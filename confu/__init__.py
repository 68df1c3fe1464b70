"""ConFu: lossless speculative decoding in which the frozen target tells the draft where it is heading."""

__version__ = "0.1.0"
