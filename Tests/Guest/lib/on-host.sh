# shellcheck shell=bash
# Sourced first by every test in Tests/Guest: the disks of one pool on the host, guests on them, the
# check of the metadata after each guest. The runner sets:
#   WAFER_GUEST_RELEASE   the guest's Debian release
#   WAFER_GUEST_PAYLOAD   folder with bin/wafer, shared with the guest
set -euo pipefail
[ -n "${WAFER_GUEST_PAYLOAD:-}" ] ||
    { echo "start it as Tests/Guest/run $(basename "$0")" >&2; exit 64; }
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
release=$WAFER_GUEST_RELEASE
work=$(mktemp -d "${TMPDIR:-/tmp}/guest-test.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

fail() { echo "FAIL: $*"; exit 1; }

# new_disks DATA_SIZE: two sparse files for one pool, empty.
metadata=$work/metadata data=$work/data
new_disks() {
    rm -f "$metadata" "$data"
    truncate -s 128M "$metadata"
    truncate -s "$1" "$data"
}

# in_guest [Scripts/guest option...]: runs the shell text on standard input with in-guest.sh loaded.
# The status is the guest's. One processor unless the test wants more: emulated ones wake each other
# slowly, on a busy host ten times so.
in_guest() {
    { echo '. /payload/lib/in-guest.sh'; cat; } > "$work/script"
    "$checkout/Scripts/guest" --release "$release" --share "$WAFER_GUEST_PAYLOAD" \
        --smp 1 --modules nbd --timeout 240 --script "$work/script" "$@"
}

# What is on the metadata disk must be clean in the eyes of both generations of thin_check. 0.9 says
# little by itself, so its exit status counts; 1.1 also reports leaks by one.
check_metadata() {
    local generation
    for generation in bookworm trixie; do
        "$checkout/Scripts/thin-tools" $generation thin_check "$metadata" > "$work/check" 2>&1 || {
            cat "$work/check"; fail "thin_check of $generation finds the metadata damaged"; }
        ! grep -i leak "$work/check" || fail "thin_check of $generation finds leaked blocks"
    done
}
