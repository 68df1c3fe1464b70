"""`python -m confu`: what torchrun starts, `torchrun --standalone --nproc-per-node=2 -m confu train RECIPE.toml`."""

import os
import sys

from confu.cli import main, run

if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Process groups that FSDP keeps outlive their destruction here, and gloo's threads in them then abort, now and
        # then, a process that has done its work.
        status = run(sys.argv[1:])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    main()
