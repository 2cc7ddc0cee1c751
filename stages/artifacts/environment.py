"""Where a stage ran: versions, machine, threads, memory."""

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

from schemas.manifest import Environment
from schemas.version import VERSION

LIBRARIES = ("torch", "numpy", "pyarrow", "tokenizers", "scikit-learn", "deepspeed", "safetensors")


def environment(started_at: str, seconds: float, processes: int = 1) -> Environment:
    """Describe this process. Loads no library: a stage that did not use torch records one thread."""
    versions = {"cpipe": VERSION, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    machine = f"{platform.system()} {platform.machine()}"
    threads = 1
    if torch := sys.modules.get("torch"):
        threads = torch.get_num_threads()
        machine += f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    return Environment(
        versions=versions,
        machine=machine,
        threads=threads,
        processes=processes,
        started=started_at,
        seconds=round(seconds, 3),
        peak_memory=peak,
    )
