"""The environment in which kernels run, so that two machines store and compare the same outputs."""

import os
import sys
from pathlib import Path


def kernel_environment(profile: str = "tiny") -> dict[str, str]:
    """os.environ with what the runs need fixed.

    Two notebooks run at a time, so each gets one thread: sums are then taken in one order, and the two do not wait
    for each other. Progress bars are off because they reach stderr or store widgets.
    """
    here = str(Path(sys.executable).parent)  # nbgrader calls alembic, and notebooks call accelerate, by name
    fixed = {
        "PATH": here + os.pathsep + os.environ.get("PATH", ""),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if profile == "tiny":
        fixed |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **fixed}
