"""What one mount was asked for: handed by `tahoefs mount` to the daemon. Imports neither trio nor the grid."""

from __future__ import annotations

import json
from pathlib import Path

from attrs import asdict, field, frozen

from tahoefs.registry import mount_id


@frozen
class MountConfig:
    """What `tahoefs mount` was asked for."""

    node_dir: str
    cap: str = field(repr=False)
    path: tuple[str, ...]
    label: str
    mountpoint: str
    options: tuple[str, ...] = ()
    local: str | None = None  # the directory of the embedded grid to run; its root is mounted, and `cap` is empty
    debug: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MountConfig:
        values = json.loads(text)
        return cls(**{**values, "path": tuple(values["path"]), "options": tuple(values["options"])})


def log_file(config: MountConfig) -> Path:
    """Where a background daemon writes its log: bounded, under the node directory."""
    return Path(config.node_dir) / "tahoefs" / "logs" / f"{mount_id(Path(config.mountpoint))}.log"
