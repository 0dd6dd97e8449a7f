"""Moved to `honed.runtime`; import from there."""

from honed.runtime import consumer_name as consumer_name
from honed.runtime import internal_channel as internal_channel
from honed.runtime import internal_token as internal_token
from honed.runtime import redis_url as redis_url
from honed.runtime import server_options as server_options
from honed.runtime import tls_files as tls_files
