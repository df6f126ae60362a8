"""Addresses in S3-compatible stores, signed for each request by botocore; web.py does the reading.

Reading by signed address leaves connections, time-outs and retries to one place, the same for every kind of store.
"""

import urllib.parse
from functools import lru_cache
from typing import Any

from data_pipeline.retries import Permanent, RemoteConfig, Transient

_GOOGLE = "https://storage.googleapis.com"  # speaks S3 to those who have HMAC keys
_VALID = 600  # seconds a signature lasts; each request is signed anew
_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role; "
    "for a public bucket data.remote.anonymous=true"
)


class Bucket:
    """The bucket of an `s3://BUCKET/PREFIX` address (or of `gs://`, through Google's S3 interface).

    Credentials, region and profile come from where every AWS tool takes them.
    """

    def __init__(self, url: str, policy: RemoteConfig):
        parts = urllib.parse.urlsplit(url)
        self.bucket = parts.netloc
        self._endpoint = policy.endpoint or (_GOOGLE if parts.scheme == "gs" else None)
        self._anonymous = policy.anonymous

    def address(self, key: str) -> str:
        """A signed https address of an object; Permanent or Transient where credentials are missing."""
        import botocore.exceptions

        try:
            return _signer(self._endpoint, self._anonymous).generate_presigned_url(
                "get_object", Params={"Bucket": self.bucket, "Key": key}, ExpiresIn=_VALID
            )
        except botocore.exceptions.CredentialRetrievalError as error:
            raise Transient(f"no credentials: {error}") from error
        except botocore.exceptions.BotoCoreError as error:
            raise Permanent(f"{type(error).__name__}: {error}", _CREDENTIALS) from error


@lru_cache
def _signer(endpoint: str | None, anonymous: bool) -> Any:
    """botocore's client, used for signing only. It holds no connection: forked workers go on using it.

    Making one takes 0.3 s.
    """
    import botocore
    import botocore.config
    import botocore.session

    session = botocore.session.get_session()
    signature: Any = botocore.UNSIGNED if anonymous else "s3v4"
    own_host = {"s3": {"addressing_style": "path"}} if endpoint else {}  # few have a name for each bucket
    return session.create_client(
        "s3",
        region_name=session.get_config_variable("region") or "us-east-1",
        endpoint_url=endpoint,
        config=botocore.config.Config(signature_version=signature, **own_host),
    )
