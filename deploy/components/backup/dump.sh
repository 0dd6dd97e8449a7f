#!/bin/sh
# Dumps the database into $BACKUPS, reads the dump back, and keeps the newest $KEEP. Where it is comes by libpq's own variables.
set -eu
mkdir -p "$BACKUPS"
rm -f "$BACKUPS"/*.partial  # of a dump that was broken off
if [ -n "${PASSWORD_FILE:-}" ]; then
    PGPASSWORD=$(cat "$PASSWORD_FILE")
    export PGPASSWORD
fi
file=$BACKUPS/honed-$(date -u +%Y%m%dT%H%M%SZ).dump
pg_dump --format=custom --no-owner --file="$file.partial"
pg_restore --list "$file.partial" >/dev/null
sync "$file.partial"
mv "$file.partial" "$file"
echo "wrote $file, $(wc -c <"$file") bytes"
ls -1 "$BACKUPS"/honed-*.dump | sort -r | tail -n "+$((KEEP + 1))" | while read -r old; do
    rm -f "$old"
    echo "removed $old"
done
