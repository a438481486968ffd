"""`python -m moba_train ...`, also the torchrun target: `torchrun --nproc-per-node 2 -m moba_train train CONFIG`."""

import sys

from moba_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
