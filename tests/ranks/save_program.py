"""Run under mpirun: convert checkpoints and save them low-bit, as --save-low-bit does.

mpirun -np N python tests/ranks/save_program.py FORMAT MODEL TARGET [MODEL TARGET ...]
"""

from __future__ import annotations

import os
import sys

from autotp_serving.config import ServingConfig
from autotp_serving.distributed.launch import join_group
from autotp_serving.model.loader import read_model_config
from autotp_serving.model.save import save_low_bit

if __name__ == "__main__":
    _, low_bit, *paths = sys.argv
    group = join_group(os.environ)
    for model_path, target in zip(paths[::2], paths[1::2], strict=True):
        config = ServingConfig(model_path=model_path, save_low_bit=target, low_bit=low_bit)
        save_low_bit(config, read_model_config(config), group)
