"""`python -m confu`, which is also what torchrun starts."""

from confu.cli import main

main()
