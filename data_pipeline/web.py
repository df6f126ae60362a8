"""One GET request: a range of a file's bytes, or a failure that says whether trying again can help."""

import contextlib
import email.utils
import netrc
import re
import ssl
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipeline.errors import ShardError
from data_pipeline.retries import Permanent, RemoteConfig, Transient

if TYPE_CHECKING:
    import urllib3

_PIECE = 1 << 20  # bytes taken from a connection at a time
_BUSY = (408, 425, 429)  # besides 5xx: try again later
_REDIRECTS = 3
_HINTS = {
    301: "the bucket lies in another region: set AWS_DEFAULT_REGION",
    400: "check the credentials, their age, and AWS_DEFAULT_REGION",
    401: "the server wants a user and a password: put them into ~/.netrc",
    403: "access is refused: check the credentials and that they may read this file",
    404: "no such file: check the address; a shard folder is uploaded whole",
    410: "the file is gone: upload the shard folder again",
}


@dataclass(frozen=True)
class Reply:
    """The bytes asked for, and how many the whole file has."""

    data: bytes
    total: int


class PastEnd(Exception):
    """The range lies beyond the end of the file."""


class Web:
    """GET requests over connections that are kept open; for one process, any number of threads.

    Proxies are taken from the environment (http_proxy, https_proxy, no_proxy), passwords from ~/.netrc or $NETRC,
    certificate authorities from the system or $SSL_CERT_FILE.
    """

    def __init__(self, policy: RemoteConfig):
        self._policy = policy
        self._pools: dict[str | None, urllib3.PoolManager] = {}

    def get(self, url: str, first: int | None = None, size: int = 0) -> Reply:
        """The whole file, or `size` bytes from `first` on.

        Raises Transient, Permanent, or PastEnd.
        """
        import urllib3

        headers = {"Accept-Encoding": "identity"} | _password(url)
        if first is not None:
            headers["Range"] = f"bytes={first}-{first + size - 1}"
        try:
            response = self._ask(url, headers)
            try:
                return self._reply(response, first, size)
            except BaseException:
                response.close()  # what is left of the body must not be taken for the next reply
                raise
            finally:
                response.release_conn()
        except urllib3.exceptions.HTTPError as error:
            raise _failure(error) from error

    def open(self, url: str) -> "Body":
        """The whole file, to be read as it comes. Raises Transient or Permanent."""
        import urllib3

        try:
            response = self._ask(url, {"Accept-Encoding": "identity"} | _password(url))
            if response.status != 200:
                try:
                    raise _refusal(response)
                finally:
                    response.close()
        except urllib3.exceptions.HTTPError as error:
            raise _failure(error) from error
        return Body(response, self._policy)

    def _ask(self, url: str, headers: dict[str, str]) -> "urllib3.BaseHTTPResponse":
        import urllib3

        return self._pool(url).request(
            "GET",
            url,
            headers=headers,
            preload_content=False,
            timeout=urllib3.Timeout(connect=self._policy.timeout, read=self._policy.timeout),
            retries=urllib3.Retry(None, connect=0, read=0, redirect=_REDIRECTS, status=0, other=0),
        )

    def _reply(self, response: "urllib3.BaseHTTPResponse", first: int | None, size: int) -> Reply:
        status = response.status
        if status == 416:
            raise PastEnd
        if status == 200 and first is not None:
            raise Permanent("the server ignores range requests (HTTP 200 for a part)", "use a server that knows them")
        if status not in (200, 206):
            raise _refusal(response)
        total = size
        if first is None and "Content-Length" not in response.headers and "Transfer-Encoding" not in response.headers:
            raise Transient("an answer without its length")  # cut in its head: where it ends would be anybody's guess
        if first is not None:
            begin, end, total = _content_range(response)
            if begin != first:
                raise Permanent(f"the server sent bytes from {begin} where {first} was asked", "look at its proxies")
            size = min(size, end - begin + 1)
        data = self._body(response)
        if first is not None and len(data) != size:
            raise Transient(f"cut short: {len(data)} of {size} bytes")
        return Reply(data, total if first is not None else len(data))

    def _body(self, response: "urllib3.BaseHTTPResponse") -> bytes:
        """All of the body; Transient where it comes slower than `slowest`."""
        pieces, received, started = [], 0, time.monotonic()
        while piece := response.read1(_PIECE):
            pieces.append(piece)
            received += len(piece)
            took = time.monotonic() - started
            if took > self._policy.timeout + received / (1e6 * self._policy.slowest):
                raise Transient(f"too slow: {received} bytes in {took:.0f} s")
        return b"".join(pieces)

    def _pool(self, url: str) -> "urllib3.PoolManager":
        import urllib3

        parts = urllib.parse.urlsplit(url)
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy and urllib.request.proxy_bypass(parts.netloc):
            proxy = None
        if proxy not in self._pools:
            sizes = {"num_pools": 16, "maxsize": self._policy.parallel, "block": False}
            self._pools[proxy] = urllib3.ProxyManager(proxy, **sizes) if proxy else urllib3.PoolManager(**sizes)
        return self._pools[proxy]


class Body:
    """A file that comes over one connection. Time counts only while it is waited for: the reader may be slow."""

    def __init__(self, response: "urllib3.BaseHTTPResponse", policy: RemoteConfig):
        self._response, self._policy = response, policy
        self._received, self._waited = 0, 0.0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end; Transient where they fail to come, or come slower than `slowest`."""
        import urllib3

        started = time.monotonic()
        try:
            data = self._response.read1(size)
        except urllib3.exceptions.HTTPError as error:
            raise _failure(error) from error
        self._waited += time.monotonic() - started
        self._received += len(data)
        if self._waited > self._policy.timeout + self._received / (1e6 * self._policy.slowest):
            raise Transient(f"too slow: {self._received} bytes in {self._waited:.0f} s")
        return data

    def close(self) -> None:
        """Close the connection, with what has not been read."""
        self._response.close()


def check_address(url: str) -> None:
    """ShardError for an address that could not work, or that holds a password."""
    parts = urllib.parse.urlsplit(url)
    if parts.username or parts.password:
        shown = url.replace(parts.netloc, parts.netloc.rpartition("@")[2])
        raise ShardError(f"{shown}: passwords do not belong into an address; put it into ~/.netrc")
    if parts.query or parts.fragment:
        raise ShardError(f"{url}: file names are appended to the address, so it must end in a folder, not in ?...")
    if not parts.hostname:
        raise ShardError(f"{url}: no host; the address is http(s)://HOST/FOLDER or s3://BUCKET/PREFIX")


def _password(url: str) -> dict[str, str]:
    import urllib3

    with contextlib.suppress(OSError, netrc.NetrcParseError):
        found = netrc.netrc().authenticators(urllib.parse.urlsplit(url).hostname or "")
        if found:
            return urllib3.make_headers(basic_auth=f"{found[0]}:{found[2]}")
    return {}


def _content_range(response: "urllib3.BaseHTTPResponse") -> tuple[int, int, int]:
    text = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", text)
    if not found:
        raise Transient(f"an answer without the place of its bytes (Content-Range: {text!r})")  # or cut in its head
    return int(found[1]), int(found[2]), int(found[3])


def _refusal(response: "urllib3.BaseHTTPResponse") -> Exception:
    """What an answer other than the file means."""
    status = response.status
    body = response.read(4096).decode(errors="replace")  # S3 gives its reason as XML
    code = re.search(r"<Code>([\w.]+)</Code>", body)
    reason = f"HTTP {status}" + (f" {code[1]}" if code else "")
    if status in _BUSY or status >= 500 or (code and code[1] in ("RequestTimeout", "SlowDown", "InternalError")):
        return Transient(reason, _retry_after(response.headers.get("Retry-After")))
    more = re.search(r"<Message>([^<]*)</Message>", body)
    remedy = _HINTS.get(status, "the server does not answer this request: check the address and the server's log")
    return Permanent(reason + (f" ({more[1]})" if more else ""), remedy)


def _retry_after(text: str | None) -> float:
    """Seconds that the server asks us to wait: a number, or a date."""
    if not text:
        return 0.0
    with contextlib.suppress(ValueError, TypeError):
        if text.isdigit():
            return float(text)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _failure(error: Exception) -> Exception:
    """What an exception of urllib3 means."""
    cause: BaseException = getattr(error, "reason", None) or error
    text = f"{type(cause).__name__}: {cause}".splitlines()[0][:300]
    if any(isinstance(each, ssl.SSLCertVerificationError) for each in (cause, *cause.args)):
        return Permanent(text, "the server's certificate is not trusted: set SSL_CERT_FILE to its authority's file")
    if "too many redirects" in text:
        return Permanent(text, "check the address")
    return Transient(re.sub(r"\?\S*", "", text))  # a signed address is not for the log
