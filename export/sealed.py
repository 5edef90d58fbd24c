"""Folders with a manifest that seals them: they appear whole or not at all, and every file is checked when one is read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gka_compile import __version__

__all__ = ["MANIFEST", "Manifest", "Sealed", "check_file", "digest_of", "holds_something", "whole"]

MANIFEST = "manifest.json"

Manifest = dict[str, Any]


@contextmanager
def whole(folder: Path, check_replaceable: Callable[[Path], None]) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``folder`` if nothing is raised meanwhile, and is gone otherwise."""
    missing = [parent for parent in folder.absolute().parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            built = Path(temporary) / folder.name
            built.mkdir()
            yield built
            check_replaceable(folder)  # again: filling it took a while
            if folder.exists():
                folder.replace(Path(temporary) / "old")
            built.replace(folder)
    except BaseException:
        with suppress(OSError):  # somebody else has put something there
            for parent in missing:
                parent.rmdir()
        raise


def holds_something(folder: Path, expected: str, error: type[ValueError] = ValueError) -> bool:
    """Whether ``folder`` is there and not empty.

    Raises:
        ValueError: it can neither be made nor be replaced; ``error`` after "expected …" if something else has its name.
    """
    _check_parents(folder)
    if not folder.exists() and not folder.is_symlink():
        return False
    if folder.is_symlink() or not folder.is_dir():
        raise error(f"{folder}: {expected}, got something else of that name")
    _check_elsewhere(folder)
    return any(folder.iterdir())


def _check_elsewhere(folder: Path) -> None:
    """Raise if the process is in ``folder``, which exists and is going to be replaced."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # removed meanwhile
        return
    if any(folder.samefile(parent) for parent in (here, *here.parents)):
        raise ValueError(f"{folder}: expected a folder that does not hold the current one, for it is replaced, got one that does")


def _check_parents(path: Path) -> None:
    """Raise unless a folder can be made at ``path``, absent folders on the way included."""
    parent = next((parent for parent in path.absolute().parents if parent.exists()), path)
    if not parent.is_dir():
        raise ValueError(f"{path}: expected a place in a folder, got {parent}, which is none")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: expected a place in a folder that may be written to, got {parent}")


def check_file(path: str | Path) -> Path:
    """Raise unless a file can be made at ``path``, in a folder that exists."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path: expected a file, got the folder {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"path: expected a file in a folder that exists, got {path}")
    return path


@dataclass(frozen=True)
class Sealed:
    """One kind of such folders.

    Attributes:
        name: with its article, for messages.
        format, version: what its manifests say they are.
        remedy: for a folder of another version.
        error: what is raised.
    """

    name: str
    format: str
    version: int
    remedy: str
    error: type[ValueError]

    def check_replaceable(self, folder: Path) -> None:
        """Raise unless ``folder`` is new, empty, or one of this kind, and not where the process is."""
        expected = f"expected a new folder or {self.name} to replace"
        if holds_something(folder, expected, self.error):
            self._read(folder, expected)

    def write(self, folder: Path, fill: Callable[[Path], Manifest]) -> Manifest:
        """Make ``folder``, replacing an older one; ``fill`` writes the files and returns what the manifest says besides them."""
        with whole(folder, self.check_replaceable) as built:
            manifest = {"format": self.format, "version": self.version, "gka_compile": __version__, **fill(built)}
            manifest["files"] = {
                path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
                for path in sorted(built.iterdir(), key=lambda p: p.name)
            }
            manifest["sha256"] = digest_of(manifest)
            (built / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        return manifest

    def load(self, folder: str | Path) -> Manifest:
        """The manifest of ``folder``, every file checked against it."""
        folder = Path(folder)
        manifest = self._read(folder, f"expected {self.name}")
        for name, entry in manifest["files"].items():
            path = folder / name
            if Path(name).name != name:
                raise self.error(f"{folder}: expected the names of files in the folder, got {name!r} in {MANIFEST}")
            if not path.is_file():
                raise self.error(f"{folder}: expected the file {name} that {MANIFEST} lists, got none")
            if path.stat().st_size != entry["bytes"]:
                raise self.error(f"{path}: expected {entry['bytes']} bytes, got {path.stat().st_size}: truncated or replaced")
            if _digest(path) != entry["sha256"]:
                raise self.error(f"{path}: expected the SHA-256 that {MANIFEST} lists, got another: the file was changed")
        return manifest

    def _read(self, folder: Path, expected: str) -> Manifest:
        """The manifest, itself checked, but not the files."""
        path = folder / MANIFEST
        if not path.is_file():
            raise self.error(f"{folder}: {expected}, got no {MANIFEST} there")
        try:
            manifest = json.loads(path.read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self.error(f"{path}: {expected}, got no JSON: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != self.format:
            raise self.error(f"{path}: {expected}, got JSON of another kind")
        if manifest.get("version") != self.version:
            raise self.error(
                f"{path}: expected format version {self.version} (gka-compile {__version__}), got {manifest.get('version')} "
                f"(gka-compile {manifest.get('gka_compile')}): {self.remedy}"
            )
        if manifest.get("sha256") != digest_of(manifest):
            raise self.error(f"{path}: expected contents of the SHA-256 that it names, got others: the manifest was changed")
        return manifest


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of(manifest: Manifest) -> str:
    """SHA-256 of all but the field that holds it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
