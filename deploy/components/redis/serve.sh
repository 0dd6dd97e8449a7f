#!/bin/sh
# Starts Redis with the password of a file, and follows the file: a new password is added to the old one, so that clients that
# have not read it yet go on; the old one ends with the next start. The password stands in no argument and no environment.
set -eu
here=$(dirname "$0")
port=${PORT:-6379}
file=${PASSWORD_FILE:-/etc/honed/redis/password}
password=$(cat "$file")
[ -n "$password" ] || { echo "the Secret honed-redis holds an empty password" >&2; exit 1; }

follow() {
    while sleep "${LOOK_S:-10}"; do
        new=$(cat "$file" 2>/dev/null || true)
        if [ -n "$new" ] && [ "$new" != "$password" ]; then
            # Commands go by standard input.
            answers=$(printf 'AUTH %s\nACL SETUSER default >%s\n' "$password" "$new" | redis-cli -p "$port" 2>/dev/null || true)
            if [ "$(echo "$answers" | grep -c '^OK$')" -eq 2 ]; then
                password=$new
                echo "the password was replaced; the one before holds until the next start"
            fi
        fi
    done
}
follow &

umask 077
conf=${TMPDIR:-/tmp}/redis.conf
{ cat "$here/redis.conf"; printf 'requirepass %s\n' "$password"; } >"$conf"
exec redis-server "$conf" --port "$port" --dir "${DATA:-/data}"
