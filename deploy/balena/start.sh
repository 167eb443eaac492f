#!/bin/sh
# Start a board by the variables of its balena device. balena has no secrets, so the claim is a variable, too: delete it
# once the board has joined, when it is worthless.
set -eu
: "${FEDPRUNE_BROKER:?is the broker of the fleet, such as mqtts://fleet.example}"
: "${FEDPRUNE_PROFILE:?is the hardware profile of the board, such as raspberry-pi-5}"
export FEDPRUNE_DEVICE="${FEDPRUNE_DEVICE:-${BALENA_DEVICE_UUID:?is set by balena}}"
set -- python3 -m fedprune_device.cli.main run --patient --state /var/lib/fedprune --data /srv/fedprune/samples.npz \
    --profile "$FEDPRUNE_PROFILE" "$@"
if [ -z "${FEDPRUNE_CLAIM:-}" ]; then
    exec "$@"
fi
claim=$FEDPRUNE_CLAIM
unset FEDPRUNE_CLAIM
exec "$@" --claim - <<END
$claim
END
