"""Runs `spikebert` with FSDP on CPU processes: torch can do that, but accelerate leaves its FSDP plugin out there.

accelerate launch --config-file FSDP.yaml tests/fsdp_on_cpu.py COMMAND OPTIONS
"""

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
main()
