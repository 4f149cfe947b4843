"""The supervisor: who runs, who is started again, the deployment's directory, and the audit from the files."""

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
