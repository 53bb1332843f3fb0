"""Documentation that Debian packages put on disk as plain text: long and short documents with real relatedness."""

from pathlib import Path
from typing import Any

from conf.errors import DataError
from data.readers import find_files

LICENCE = "as /usr/share/doc/<package>/copyright says (GPL-2, PSF-2.0, Artistic, GFDL and others)"
PACKAGES = ("linux-doc", "python3-doc", "git-doc", "perl-doc", "debian-policy")
MIN_FILES = 200  # fewer: the documentation packages are not there, only leftovers of others
SUFFIXES = (".rst", ".txt", ".yaml", ".md", ".pod", ".adoc")
TREES = ("usr/share/doc", "usr/share/perl")


def files(root: str) -> list[dict[str, Any]]:
    """Documentation files below ``root`` (``/``, or where packages were unpacked), as ``find_files`` gives them.

    Raises DataError with the packages to install when there are few.
    """
    base = Path(root or "/")
    found = [
        {**entry, "name": f"{tree}/{entry['name']}"}
        for tree in TREES
        if (base / tree).is_dir()
        for entry in find_files(str(base / tree))
        if entry["name"].removesuffix(".gz").endswith(SUFFIXES)
    ]
    if len(found) < MIN_FILES:
        rule = f"at least {MIN_FILES} text files of Debian documentation packages"
        fix = f"apt-get install {' '.join(PACKAGES)} (or unpack them with `dpkg -x` and set data.path to that folder)"
        raise DataError("data.source", f"debian_docs: {len(found)} files below {base}", rule, fix)
    return found
