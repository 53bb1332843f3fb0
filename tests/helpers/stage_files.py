"""What the stages of a run have on disk, for comparisons byte by byte."""

from pathlib import Path

from data.fence import OWNER
from data.files import LOCK
from data.manifest import NAME, read_manifest


def stage_files(root: Path) -> dict[str, bytes]:
    """All files below ``root`` by name but markers and locks; of a manifest everything but its date and folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.parent.name != "markers" and path.name not in (LOCK, OWNER):
            data = path.read_bytes()
            if path.name == NAME:
                manifest = read_manifest(path.parent)
                data = repr((manifest.fingerprint, manifest.parent, manifest.figures, manifest.files)).encode()
            found[str(path.relative_to(root))] = data
    return found
