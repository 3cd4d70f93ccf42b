from __future__ import annotations

import sys
from pathlib import Path

# The server around a fake engine (live_server.py) and its engines are those of the server's tests.
sys.path.append(str(Path(__file__).parents[2] / "server"))
