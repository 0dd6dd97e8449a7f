#!/bin/sh
# Restores the newest dump of $BACKUPS, or $FILE of it, over what the database holds: all of it or nothing.
set -eu
if [ -n "${PASSWORD_FILE:-}" ]; then
    PGPASSWORD=$(cat "$PASSWORD_FILE")
    export PGPASSWORD
fi
if [ -n "${FILE:-}" ]; then
    file=$BACKUPS/$FILE
else
    file=$(ls -1 "$BACKUPS"/honed-*.dump 2>/dev/null | sort | tail -n 1)
fi
[ -n "$file" ] && [ -f "$file" ] || { echo "there is no dump ${file:-in $BACKUPS} to restore" >&2; exit 1; }
pg_restore --clean --if-exists --no-owner --exit-on-error --single-transaction --dbname="${PGDATABASE}" "$file"
echo "restored $file"
