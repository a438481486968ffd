"""What is checked on a GPU: `python tests/gpu/run.py` (torch, triton and numpy suffice), or `pytest -m gpu tests/gpu`.

The parity core is the benchmark's (kernels/bench/moba_bench/parity.py): what gates figures also gates the kernels.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

for folder in (ROOT / "kernels" / "bench", ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
