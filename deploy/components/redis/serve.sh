#!/bin/sh
# Starts Redis with the password of a file, and follows the file: a new password is added to the old one, so that clients that have
# not read it yet go on; the old one ends with the next start. The password stands in no argument and no environment.
set -eu
file=/etc/honed/redis/password
password=$(cat "$file")
[ -n "$password" ] || { echo "the Secret honed-redis holds an empty password" >&2; exit 1; }

follow() {
    while sleep 10; do
        new=$(cat "$file" 2>/dev/null || true)
        if [ -n "$new" ] && [ "$new" != "$password" ]; then
            # Commands go by standard input.
            if printf 'AUTH %s\nACL SETUSER default >%s\n' "$password" "$new" | redis-cli -e >/dev/null 2>&1; then
                password=$new
                echo "the password was replaced; the one before holds until the next start"
            fi
        fi
    done
}
follow &

{ cat /etc/redis/redis.conf; printf 'requirepass %s\n' "$password"; } >/tmp/redis.conf
exec redis-server /tmp/redis.conf
