#!/bin/sh
# Install fedprune on this board from a kit on a web server, and join the fleet:
#
#     curl -fsSL https://fleet.example/join.sh | sudo FEDPRUNE_CLAIM=CLAIM sh -s -- https://fleet.example/attic-kit DIGEST
#
# DIGEST is the sha256 that `fedprune-flash kit` prints. It is checked before anything that was fetched is run, and
# through kit.json it covers each of the kit's files. Further arguments go to the kit's installer. See docs/join.md.
set -eu

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-60}"
}

fetch() { # fetch NAME: a file of the kit, into the folder
    curl --fail --silent --show-error --location --proto "=$scheme" --create-dirs --output "$folder/$1" "$url/$1" ||
        fail "can't fetch $url/$1. Is the address that of a kit's folder?" 20
}

claim_to() { # claim_to ROOT: where the board finds it at its first start
    target=$1/var/lib/fedprune/claim
    owner=$(stat -c %u:%g "$1/var/lib/fedprune")
    (umask 077 && printf '%s\n' "$FEDPRUNE_CLAIM" >"$target.new")
    chown "$owner" "$target.new"
    chmod 400 "$target.new"
    mv "$target.new" "$target"
}

main() {
    [ $# -ge 2 ] || fail "expected the address of a kit and its digest: join.sh https://HOST/KIT DIGEST [OPTION...]" 2
    url=${1%/} digest=$2
    shift 2
    case $url in
    https://*) scheme=https ;;
    http://127.0.0.1[:/]* | http://localhost[:/]*) scheme=http ;;
    *) fail "the address $url is not https://" 2 ;;
    esac
    printf '%s\n' "$digest" | grep -Eqx '[0-9a-f]{64}' || fail "the digest is not 64 hex digits: $digest" 2
    for program in curl python3 sha256sum; do
        command -v "$program" >/dev/null || fail "$program is missing: apt-get install curl python3 coreutils" 3
    done
    root='' before=''
    for argument; do
        [ "$before" != --root ] || root=$argument
        before=$argument
    done

    umask 077
    folder=$(mktemp -d "${TMPDIR:-/var/tmp}/fedprune-kit.XXXXXX")
    trap 'rm -rf "$folder"' EXIT
    trap 'exit 4' HUP INT TERM
    fetch kit.json
    printf '%s  %s\n' "$digest" "$folder/kit.json" | sha256sum --check --status ||
        fail "kit.json at $url has another digest than $digest: copy the line again, or make the kit again"
    python3 -c '
import json, re, sys
body = json.load(open(sys.argv[1]))
if body.get("claim"):
    sys.exit("error: this kit has a claim, which a web server would show: make it without, and set FEDPRUNE_CLAIM")
for row in body["files"]:
    if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*(/[A-Za-z0-9_+-][A-Za-z0-9._+-]*)*", row["path"]):
        sys.exit("error: the kit names a file that is not one of a kit")
    print(row["sha256"] + "  " + row["path"])
' "$folder/kit.json" >"$folder.sums" || { rm -f "$folder.sums" && exit 60; }
    trap 'rm -rf "$folder" "$folder.sums"' EXIT
    while read -r _ name; do
        fetch "$name"
    done <"$folder.sums"
    (cd "$folder" && sha256sum --check --quiet "$folder.sums") || fail "the kit at $url is damaged: make it again"

    if [ -z "${FEDPRUNE_CLAIM:-}" ]; then
        python3 "$folder/install.pyz" "$@"
        return
    fi
    python3 "$folder/install.pyz" --no-start "$@"
    claim_to "$root"
    if [ -z "$root" ]; then
        systemctl daemon-reload
        systemctl restart --no-block fedprune.service
    fi
}

# At the end, so that a script that was cut off on its way does nothing.
main "$@"
