#!/bin/sh
# Whether Redis answers, and has loaded its data.
REDISCLI_AUTH=$(cat /etc/honed/redis/password) timeout 5 redis-cli ping | grep -q PONG
