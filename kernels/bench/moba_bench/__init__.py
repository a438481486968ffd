"""What the benchmark scripts of this folder share.

kernels/ goes to the front of the import path, so that this tree is measured and not an installed copy; a bare machine
(torch, triton and numpy only) then needs no set-up step.
"""

import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2]

if str(KERNELS) not in sys.path:
    sys.path.insert(0, str(KERNELS))
