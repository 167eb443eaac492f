#!/bin/sh
# Make the database's password, and the address with which the server reaches it: deploy/secrets.sh [FOLDER]
# Existing files are left alone.
set -eu
folder=${1:-$(dirname "$0")/secrets}
umask 077
mkdir -p "$folder"
chmod 700 "$folder"
if [ ! -e "$folder/database-password" ]; then
    head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$folder/database-password"
fi
if [ ! -e "$folder/database-url" ]; then
    printf 'postgresql+psycopg://fedprune:%s@database/fedprune' "$(cat "$folder/database-password")" >"$folder/database-url"
fi
# Each container reads them as a user of its own; the folder's mode keeps other users out.
chmod 444 "$folder/database-password" "$folder/database-url"
