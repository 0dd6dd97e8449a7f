#!/bin/sh
# Whether Redis answers, and has loaded its data.
REDISCLI_AUTH=$(cat "${PASSWORD_FILE:-/etc/honed/redis/password}")
export REDISCLI_AUTH
timeout 5 redis-cli -p "${PORT:-6379}" ping | grep -q '^PONG$'
