"""The environment that a report describes: versions, commit, operating system, device."""

import platform
import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from . import __version__


def environment(device: str | torch.device) -> dict[str, str]:
    """For a bug report, name -> text: versions, commit, operating system, device."""
    name = commit()
    return {
        "t2t_fast": __version__ if name is None else f"{__version__} (commit {name})",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(terse=True),
        "device": device_name(device),
    }


def device_name(device: str | torch.device) -> str:
    """The device's model name and properties."""
    device = torch.device(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}, CUDA {torch.version.cuda})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return str(device)


@cache
def cpu_name() -> str:
    """The processor's model name as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """The installed version of a package, or ``None``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """The NVIDIA driver's version as nvidia-smi reports it, or ``None``."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        found = subprocess.run(
            [tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = found.stdout.split()
    return lines[0] if found.returncode == 0 and lines else None


@cache
def commit() -> str | None:
    """Short hash of the git checkout that this package runs from ("+" if files changed), or ``None`` outside one."""
    folder = Path(__file__).parent

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10)

    try:
        # a package installed inside another project's checkout must not report that project's commit
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:
            return None
        found, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "") if found.returncode == 0 else None
