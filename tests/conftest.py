"""Make tests/helpers.py and tests/compiling.py importable by their names under --import-mode=importlib."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
