#!/bin/sh
# Install fedprune on this board from a kit on a web server, and join the fleet:
#
#     curl -fsSL https://fleet.example/join.sh | sudo FEDPRUNE_CLAIM=CLAIM sh -s -- https://fleet.example/attic-kit DIGEST
#
# DIGEST is the sha256 that `fedprune-flash kit` prints. It is checked before anything that was fetched is run, and
# through kit.json it covers each of the kit's files. Further arguments go to the kit's installer. See docs/join.md.
set -eu

most=4194304 # bytes of kit.json, which is fetched before its digest is compared

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-60}"
}

fetch() { # fetch NAME BYTES: a file of the kit that has at most this size, into the folder
    file=$folder/kit/$1
    mkdir -p "${file%/*}" || fail "can't write $file" 31
    # head, because curl before 8.4 heeds --max-filesize only where the server announces a size.
    {
        curl --fail --silent --show-error --location --proto "=$scheme" "$url/$1" || : >"$folder/failed"
    } | head -c "$(($2 + 1))" >"$file" || fail "can't write $file" 31
    [ "$(wc -c <"$file")" -le "$2" ] || fail "$url/$1 has more than $2 bytes: make the kit again"
    [ ! -e "$folder/failed" ] || fail "can't fetch $url/$1. Is the address that of a kit's folder?" 20
}

matches() { # matches SHA256 NAME: whether a file of the kit has this digest
    printf '%s  %s\n' "$1" "$folder/kit/$2" | sha256sum --check --status
}

main() {
    [ $# -ge 2 ] || fail "expected the address of a kit and its digest: join.sh https://HOST/KIT DIGEST [OPTION...]" 2
    url=${1%/} digest=$2
    shift 2
    # Nothing but a host and a port before the path: http://localhost:x@evil is evil's.
    host=${url#*://} host=${host%%/*}
    printf '%s\n' "$host" | grep -Eqx '([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?' ||
        fail "the address $url has no plain host and port" 2
    case $url in
    https://*) scheme=https ;;
    http://"$host" | http://"$host"/*)
        case $host in
        127.0.0.1 | 127.0.0.1:* | localhost | localhost:*) scheme=http ;;
        *) fail "the address $url is not https://" 2 ;;
        esac
        ;;
    *) fail "the address $url is not https://" 2 ;;
    esac
    printf '%s\n' "$digest" | grep -Eqx '[0-9a-f]{64}' || fail "the digest is not 64 hex digits: $digest" 2
    for program in curl python3 sha256sum; do
        command -v "$program" >/dev/null || fail "$program is missing: apt-get install curl python3 coreutils" 3
    done
    claim=${FEDPRUNE_CLAIM:-}
    unset FEDPRUNE_CLAIM

    umask 077
    folder=
    trap 'rm -rf "$folder"' EXIT
    trap 'exit 4' HUP INT TERM
    folder=$(mktemp -d "${TMPDIR:-/var/tmp}/fedprune-kit.XXXXXX") ||
        fail "can't make a folder in ${TMPDIR:-/var/tmp}" 31
    fetch kit.json "$most"
    matches "$digest" kit.json ||
        fail "kit.json at $url has another digest than $digest: copy the line again, or make the kit again"
    # -I, because Python would import modules from the working folder, which may be anybody's.
    files=$(python3 -I -c '
import json, re, sys
body = json.load(open(sys.argv[1]))
if body.get("claim"):
    sys.exit("error: this kit has a claim, which a web server would show: make it without, and set FEDPRUNE_CLAIM")
for row in body["files"]:
    if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*(/[A-Za-z0-9_+-][A-Za-z0-9._+-]*)*", row["path"]):
        sys.exit("error: the kit names a file that is not one of a kit")
    print(row["bytes"], row["sha256"], row["path"])
' "$folder/kit/kit.json") || exit 60
    while read -r bytes sum path; do
        [ -n "$path" ] || continue
        fetch "$path" "$bytes"
        matches "$sum" "$path" || fail "the kit at $url is damaged ($path): make it again"
    done <<END
$files
END

    # The installer writes the claim: the folder that it belongs in is the service's, so root must not follow its links.
    if [ -n "$claim" ]; then
        set -- --claim - "$@"
    fi
    python3 -I "$folder/kit/install.pyz" "$@" <<END
$claim
END
}

# At the end, so that a script that was cut off on its way does nothing.
main "$@"
