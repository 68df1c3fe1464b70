"""ConFu: lossless speculative decoding in which the frozen target tells the draft where it is heading."""

import os
import platform
import sys

__version__ = "0.1.0"

WAITING = {"GOMP_SPINCOUNT": "10000"}
"""How often threads of torch's OpenMP (GNU's, on Linux) look before they sleep: for 0.1 ms or some more, longer than
what lies between two parts of a round. Its own 300,000 slow decoding down where the machine has other work to do
(docs/speed.md). Read when torch is loaded."""
if (sys.platform, platform.machine()) == ("linux", "x86_64") and not {"OMP_WAIT_POLICY", *WAITING} & os.environ.keys():
    os.environ.update(WAITING)
