"""Runs `spikebert` commands one after another in the processes of one launch, which import everything once.

    accelerate launch --config-file FILE.yaml tests/launched_commands.py [NAME=VALUE ...] COMMAND OPTIONS [then ...]

Each NAME=VALUE goes into the environment first. A command that is not the last leaves the process group to the next:
the address of a launch serves for one. FSDP runs on CPU processes, too: torch can do that, but accelerate
leaves its FSDP plugin out there.
"""

import os
import sys
from itertools import groupby

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from modeling_spikebert.commands import main

initialise = AcceleratorState.__init__


def initialise_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
    if "fsdp_plugin" in vars(self):
        self.distributed_type = DistributedType.FSDP


def waited(method):
    """Gathered weights go to the CPU, which waits for them; on a CPU nothing does."""

    def call(*args, **kwargs):
        tensor = method(*args, **kwargs)
        return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor

    return call


AcceleratorState.__init__ = initialise_with_fsdp
DTensor.full_tensor = waited(DTensor.full_tensor)
DTensor.to_local = waited(DTensor.to_local)
commands = [list(words) for joins, words in groupby(sys.argv[1:], "then".__eq__) if not joins]
destroy = torch.distributed.destroy_process_group
for i, command in enumerate(commands, 1):
    torch.distributed.destroy_process_group = destroy if i == len(commands) else torch.distributed.barrier
    while "=" in command[0]:
        name, _, value = command.pop(0).partition("=")
        os.environ[name] = value
    main(command)
