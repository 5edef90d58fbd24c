"""tests/helpers.py and tests/compiling.py importable by their names under --import-mode=importlib; cores shared between workers."""

import os
import sys
from pathlib import Path

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # more threads than cores wait for each other, over small tensors thirty times as long: in workers and in what they start
    threads = max(1, len(os.sched_getaffinity(0)) // int(workers))
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(name, str(threads))

sys.path.insert(0, str(Path(__file__).parent))
