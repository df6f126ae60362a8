"""What reading records over HTTP costs, against a local disk: `python -m tests.benchmarks.remote_read`.

One process reads the same records in the same random order, sha256 checked, nothing decoded: from the local folder,
from an nginx on loopback, through a proxy that adds a delay to every request as a distant store does, and through the
local cache. Rounds of all ways alternate; the best round counts. CPU is this process's own (nginx's is not in it, the
proxy's is). It says what our code costs and what reading ahead hides, not what a network gives.
"""

import argparse
import hashlib
import json
import random
import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from data_pipeline.cache import RecordCache
from data_pipeline.retries import RemoteConfig
from data_pipeline.shards import Shards
from tests.data_pipeline.servers import faulty_proxy, find_nginx, nginx

GROUP = 24  # records that a worker asks for together: the reference's micro-batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=240)
    parser.add_argument("--kilobytes", type=int, default=400, help="size of a record; 10 s of 320x240 is about this")
    parser.add_argument("--delay", type=float, default=0.03, help="seconds that the proxy adds to each request")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if find_nginx() is None:
        raise SystemExit("there is no nginx: `make setup` gets it from apt")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_shards(folder / "www" / "shards", options.records, 1000 * options.kilobytes)
        (folder / "nginx").mkdir()
        with nginx(folder / "www", folder / "nginx") as url, faulty_proxy(("127.0.0.1", port_of(url))) as proxy:
            proxy.inject(always=lambda answer, send: (time.sleep(options.delay), send(answer))[1])
            measure(folder, f"{url}/shards", f"http://127.0.0.1:{proxy.port}/shards", options)


def measure(folder: Path, near: str, far: str, options: argparse.Namespace) -> None:
    """All ways, round by round, and the table."""
    local = folder / "www" / "shards"
    warm = RecordCache(folder / "cache", 10**12)
    delay = f"{1000 * options.delay:.0f} ms"
    ways: dict[str, Callable[[], tuple[Shards, bool]]] = {
        "local folder": lambda: (Shards(local, "video"), False),
        "HTTP, one by one": lambda: (Shards(near, "video"), False),
        "HTTP, read ahead": lambda: (Shards(near, "video"), True),
        "HTTP, cold cache": lambda: (Shards(near, "video", cache=fresh_cache(folder)), False),
        "HTTP, warm cache": lambda: (Shards(near, "video", cache=warm), False),
        f"HTTP + {delay}, one by one": lambda: (Shards(far, "video"), False),
        f"HTTP + {delay}, read ahead": lambda: (Shards(far, "video", remote=RemoteConfig()), True),
    }
    read_all(*ways["HTTP, warm cache"]())
    rounds = [{name: read_all(*way()) for name, way in ways.items()} for _ in range(options.rounds)]
    base = min(each["local folder"][0] for each in rounds)
    print(f"{options.records} records of {options.kilobytes} kB, best of {options.rounds} rounds")
    print(f"{'':28} {'records/s':>10} {'of local':>9} {'CPU ms a record':>16}")
    for name in ways:
        wall, cpu = (min(each[name][i] for each in rounds) for i in (0, 1))
        print(
            f"{name:28} {options.records / wall:10.0f} {base / wall:8.0%} {1000 * cpu / options.records:16.2f}",
            flush=True,
        )


def read_all(opened: Shards, ahead: bool) -> tuple[float, float]:
    """Seconds of wall and of CPU to read every record once, in groups as a worker does."""
    order = list(range(len(opened)))
    random.Random(0).shuffle(order)
    wall, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(order), GROUP):
        group = order[first : first + GROUP]
        if ahead:
            opened.read_ahead(group)
        for index in group:
            opened.read(index, verify=True)
    spent = time.perf_counter() - wall, time.process_time() - cpu
    opened.close()
    return spent


def fresh_cache(folder: Path) -> RecordCache:
    return RecordCache(tempfile.mkdtemp(dir=folder), 10**12)


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def write_shards(folder: Path, records: int, size: int) -> None:
    """A shard folder with one tar of random bytes."""
    folder.mkdir(parents=True)
    tar, generator = folder / "video-000000.tar", random.Random(0)
    rows = []
    with tarfile.open(tar, "w") as archive:
        for number in range(records):
            data = generator.randbytes(size)
            member = tarfile.TarInfo(f"clip-{number:06d}.mp4")
            member.size = size
            place = archive.offset + 512  # after the member's header
            archive.addfile(member, BytesIO(data))
            row = {"key": f"clip-{number:06d}", "ext": "mp4", "offset": place, "size": size, "modality": "video"}
            rows.append(row | {"sha256": hashlib.sha256(data).hexdigest()})
    index = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "video-000000.index.jsonl").write_bytes(index)
    entry = {"name": tar.name, "index": "video-000000.index.jsonl", "modality": "video", "samples": records}
    entry |= {"bytes": tar.stat().st_size, "index_sha256": hashlib.sha256(index).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "shards": [entry]}))


if __name__ == "__main__":
    main()
