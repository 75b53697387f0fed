"""Tests of the server, the clients and the scripts."""

import os
from pathlib import Path

# Where there is no NVIDIA card, Triton's kernels run by its interpreter. Triton reads the switch
# when it is imported first, by whichever test that happens.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
