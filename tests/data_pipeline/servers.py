"""Servers on loopback for the tests of remote sources: nginx, moto's S3, and a proxy that injects faults.

Every one takes a port that the system chose and is stopped by the fixture that started it.
"""

import contextlib
import os
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NGINX = """
daemon off; master_process off; error_log {scratch}/error.log warn; pid {scratch}/pid;
events {{ worker_connections 256; }}
http {{
  access_log {scratch}/access.log; default_type application/octet-stream;
  client_body_temp_path {scratch}; proxy_temp_path {scratch}; fastcgi_temp_path {scratch};
  uwsgi_temp_path {scratch}; scgi_temp_path {scratch};
  server {{
    listen {listen}; {tls}
    root {root};
    location /secret/ {{ auth_basic "s"; auth_basic_user_file {scratch}/users; alias {root}/; }}
    location /forbidden/ {{ return 403; }}
    location /norange/ {{ alias {root}/; max_ranges 0; }}
    location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
  }}
}}
"""


def find_nginx() -> str | None:
    """The nginx that `make setup` put into the virtual environment, or the system's."""
    own = Path(sys.prefix) / "nginx" / "nginx"
    return str(own) if own.is_file() else shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")


@contextlib.contextmanager
def nginx(root: Path, scratch: Path, certificate: Path | None = None) -> Iterator[str]:
    """Serve `root`; yields the address. With a certificate (and its key, `.key`) over TLS."""
    program = find_nginx()
    assert program
    (scratch / "users").write_text("someone:{PLAIN}pass word\n")
    root.chmod(0o755)
    for _ in range(5):
        with socket.create_server(("127.0.0.1", 0)) as chosen:
            port = chosen.getsockname()[1]
        listen, tls = f"127.0.0.1:{port}", ""
        if certificate:
            listen += " ssl"
            tls = f"ssl_certificate {certificate}; ssl_certificate_key {certificate.with_suffix('.key')};"
        config = NGINX.format(scratch=scratch, root=root, listen=listen, tls=tls)
        (scratch / "nginx.conf").write_text(config)
        process = subprocess.Popen([program, "-p", str(scratch), "-c", str(scratch / "nginx.conf")])
        if _answers(port, process):
            break
    else:
        raise RuntimeError(f"nginx did not start: {(scratch / 'error.log').read_text()}")
    try:
        yield f"{'https' if certificate else 'http'}://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + 60  # where the port was taken meanwhile, it ends by itself
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=60):
            return True
        time.sleep(0.02)
    return False


Fault = Callable[[bytes, Callable[[bytes], None]], None]
"""Given a whole answer and a way to send bytes, sends what the fault leaves of it; then the connection is closed.

An answer of its own says so, for a client that repeats its request before the end is there would lose it otherwise.
"""


class Reset(Exception):
    """Close with a TCP reset."""


def reset(answer: bytes, send: Callable[[bytes], None]) -> None:
    """A connection reset in the middle of the body."""
    send(answer[: len(answer) // 2])
    raise Reset


def reset_at_once(answer: bytes, send: Callable[[bytes], None]) -> None:
    """A connection reset before the first byte."""
    raise Reset


def truncate(answer: bytes, send: Callable[[bytes], None]) -> None:
    """An answer that ends early, in an orderly way."""
    send(answer[:-7])


def busy(answer: bytes, send: Callable[[bytes], None]) -> None:
    """503, please come back at once."""
    send(b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n")


def too_many(answer: bytes, send: Callable[[bytes], None]) -> None:
    """429."""
    send(b"HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\nContent-Length: 5\r\n\r\nlater")


def trickle(answer: bytes, send: Callable[[bytes], None]) -> None:
    """A body of a few bytes a second."""
    start = answer.index(b"\r\n\r\n") + 4
    send(answer[:start])
    for i in range(60):
        send(answer[start + 8 * i : start + 8 * i + 8])
        time.sleep(0.05)


def silent(answer: bytes, send: Callable[[bytes], None]) -> None:
    """No answer at all for a while."""
    time.sleep(3.0)


def flip(answer: bytes, send: Callable[[bytes], None]) -> None:
    """A bit that flipped on the way."""
    send(answer[:-1] + bytes([answer[-1] ^ 1]))


@dataclass
class Proxy:
    """Passes requests on; `faults[i]` is done to the i-th request after the last `inject`, None passes."""

    upstream: tuple[str, int]
    port: int = 0
    faults: list[Fault | None] = field(default_factory=list)
    always: Fault | None = None
    requests: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def inject(self, *faults: Fault | None, always: Fault | None = None) -> None:
        """Faults of the next requests, and of all after them."""
        with self._lock:
            self.faults, self.always = list(faults), always
            self.requests.clear()

    def next(self, line: str) -> Fault | None:
        """The fault of this request."""
        with self._lock:
            self.requests.append(line)
            return self.faults.pop(0) if self.faults else self.always

    def fetch(self, head: bytes) -> bytes:
        """The whole answer to a request without a body."""
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        lines.insert(1, b"Connection: close")
        with socket.create_connection(self.upstream, timeout=60) as server:
            server.sendall(b"\r\n".join(lines))
            answer = b""
            while piece := server.recv(1 << 16):
                answer += piece
        return answer


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        proxy: Proxy = self.server.proxy  # pyright: ignore[reportAttributeAccessIssue]
        self.request.settimeout(60)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            piece = self.request.recv(1 << 16)
            if not piece:
                return
            head += piece
        fault = proxy.next(head.partition(b"\r\n")[0].decode())
        answer = proxy.fetch(head)
        try:
            fault(answer, self.request.sendall) if fault else self.request.sendall(answer)
        except Reset:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:  # the client has had enough
            pass


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without an orderly shutdown first: a reset must stay one


@contextlib.contextmanager
def faulty_proxy(upstream: tuple[str, int]) -> Iterator[Proxy]:
    """A proxy in front of `upstream`, one request a connection."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        proxy = Proxy(upstream, server.server_address[1])
        server.proxy = proxy  # pyright: ignore[reportAttributeAccessIssue]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield proxy
        server.shutdown()
        thread.join()
