"""What can be wrong with stored data. All are ValueErrors: their messages are for people."""


class ShardError(ValueError):
    """A shard folder is missing, incomplete or damaged; the message names the file and what to do."""


class RemoteError(ShardError):
    """The network or a server failed for longer than the retries last. Not a bad sample: the run stops, and resumes."""


class RecordError(ValueError):
    """One record's bytes are not those that were ingested."""
