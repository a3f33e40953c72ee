"""train_hf.py with weights that are sharded over processes on a CPU, which accelerate does on GPUs only.

accelerate launch --config_file scripts/recipes/accelerate/fsdp.yaml tests/sharded_on_cpu.py --use_cpu True …
"""

import os
import runpy
import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

begin = PartialState.__init__


def begin_as_on_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
    begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = begin_as_on_gpus
sys.path[0] = os.getcwd()  # this project, and not another copy of it that is installed
runpy.run_path("train_hf.py", run_name="__main__")
sys.exit(0)
