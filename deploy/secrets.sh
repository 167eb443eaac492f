#!/bin/sh
# Make the database's password, and the address with which the server reaches it: deploy/secrets.sh [FOLDER]
# Nothing that is there is changed.
set -eu
folder=${1:-$(dirname "$0")/secrets}
umask 077
mkdir -p "$folder"
chmod 700 "$folder"
if [ ! -e "$folder/database-password" ]; then
    head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$folder/database-password"
fi
printf 'postgresql+psycopg://fedprune:%s@database/fedprune' "$(cat "$folder/database-password")" >"$folder/database-url"
# Each container runs as a user of its own, who must be able to read them; the folder keeps others out.
chmod 444 "$folder/database-password" "$folder/database-url"
