"""The bundled demo checkpoint: a small trained digit DiT, so that the main job works right after the install."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

DEMO = "demo"


def demo_path() -> Path:
    """Folder of the demo pipeline inside the package."""
    return Path(str(resources.files(__package__))) / "demo_data"
