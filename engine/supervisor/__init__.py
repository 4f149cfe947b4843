"""The supervisor: who runs, who is started again, the deployment's directory, and the audit from the files.

Street: neither. It serves nothing and loads no tensors, so that it outlives whatever happens to those that do. What it
decides is in `policy`, which is pure; the rest obeys.
"""

from __future__ import annotations

from engine.supervisor.directory import DeploymentDirectory, DirectoryError, default_runtime_directory
from engine.supervisor.supervisor import ListenError, Supervisor, listen

__all__ = [
    "DeploymentDirectory",
    "DirectoryError",
    "ListenError",
    "Supervisor",
    "default_runtime_directory",
    "listen",
]
