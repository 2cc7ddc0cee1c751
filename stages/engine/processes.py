"""Which process this is among those that train together, and what it computes on.

- alone, the process group lives in memory: no port, no file, nothing left behind by a kill
"""

import os
from dataclasses import dataclass

import torch

from schemas.failures import UsageFailure
from schemas.launch import launched_as, meeting_point


@dataclass(frozen=True)
class Place:
    """Position of this process: rank among `world` processes, `local` rank on its machine, its device."""

    rank: int
    local: int
    world: int
    device: torch.device


def find_place() -> Place:
    """Read the launcher's variables. Raises UsageFailure for a rank without a device of its own."""
    rank, local, world = launched_as()
    if not torch.cuda.is_available():
        return Place(rank, local, world, torch.device("cpu"))
    if local >= torch.cuda.device_count():
        raise UsageFailure(
            f"process {rank} is number {local} on its machine, which has {torch.cuda.device_count()} devices: "
            "start at most one process per device"
        )
    return Place(rank, local, world, torch.device("cuda", local))


def join_processes(place: Place) -> None:
    """Set up torch's process group, once per process."""
    if torch.distributed.is_initialized():
        return
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    if place.world == 1:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # torch does not list it
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    host, port = meeting_point()
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ.setdefault("RANK", str(place.rank))
    os.environ.setdefault("WORLD_SIZE", str(place.world))
    os.environ.setdefault("LOCAL_RANK", str(place.local))
    torch.distributed.init_process_group(backend, rank=place.rank, world_size=place.world)


def meet() -> None:
    """Wait until every process has come here: before the first one changes files by which the others decide."""
    place = find_place()
    if place.world > 1:
        join_processes(place)
        torch.distributed.barrier()


def mean_over_processes(value: torch.Tensor, place: Place) -> torch.Tensor:
    """The mean of a scalar over all processes."""
    if place.world == 1:
        return value
    value = value.detach().clone()
    torch.distributed.all_reduce(value)
    return value / place.world


def any_process(flag: bool, place: Place) -> bool:
    """Whether the flag is set on any process: a signal reaches them at different steps, yet they must stop at one."""
    if place.world == 1:
        return flag  # and no wait for the device
    return bool(mean_over_processes(torch.tensor(float(flag), device=place.device), place))


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 arithmetic is native here; elsewhere it is emulated and slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
