# shellcheck shell=bash
# Sourced first by every test in Tests/Interop: a pool in a directory of its own, a server on it,
# and the clients of one Debian release first in the path. The runner sets:
#   WAFER_PROGRAM           the program under test
#   WAFER_INTEROP_CLIENTS   folder of the release's clients
set -euo pipefail
[ -n "${WAFER_INTEROP_CLIENTS:-}" ] ||
    { echo "start it as Tests/Interop/run $(basename "$0")" >&2; exit 64; }
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
PATH=$WAFER_INTEROP_CLIENTS:$PATH
# Where nbdkit's plugins and filters are.
nbdkit_files=$WAFER_INTEROP_CLIENTS/../root/usr/lib/x86_64-linux-gnu/nbdkit
work=$(mktemp -d "${TMPDIR:-/tmp}/interop-test.XXXXXX")
pool=$work/pool socket=$work/nbd.sock port='' server=''
cd "$work"
helpers=()                              # pids that end with the test
clean_up() {
    local pid
    for pid in $server "${helpers[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

fail() { echo "FAIL: $*"; [ ! -s "$work/log" ] || tail -n 20 "$work/log"; exit 1; }
skip() { echo "$*"; exit 77; }
step() { echo "-- $*"; }
wafer() { "$WAFER_PROGRAM" "$@"; }
quietly() { "$@" > "$work/quiet" 2>&1 || { cat "$work/quiet"; fail "$*"; }; }
# equal WHAT FOUND EXPECTED
equal() { [ "$2" = "$3" ] || fail "$1: found \"$2\" where \"$3\" was expected"; }
# contains FILE TEXT...
contains() {
    local file=$1 text; shift
    for text in "$@"; do
        grep -qF -- "$text" "$file" || { cat "$file"; fail "there is no \"$text\" in it"; }
    done
}
refused() { ! "$@" > "$work/quiet" 2>&1 || { cat "$work/quiet"; fail "it worked: $*"; }; }

# start_pool [NAME SIZE]...: a pool with these volumes, not served yet.
start_pool() {
    quietly wafer pool create "$pool" --data-size 1GiB
    while [ $# -gt 0 ]; do quietly wafer volume create "$pool" "$1" "$2"; shift 2; done
}
# A hundred more.
many_volumes() {
    local each
    for each in {1..100}; do quietly wafer volume create "$pool" "many-$each" 1MiB; done
}
# start_server [wafer serve option...]: on $socket, and on 127.0.0.1:$port.
start_server() {
    local end=$((SECONDS + 30))
    : > "$work/ways"
    "$WAFER_PROGRAM" serve "$pool" --unix "$socket" --listen 127.0.0.1:0 "$@" \
        > "$work/ways" 2> "$work/log" &
    server=$!
    until [ "$(grep -c '^listening on ' "$work/ways")" = 2 ]; do
        [ $SECONDS -lt $end ] && kill -0 "$server" 2>/dev/null || fail "no server"
        sleep 0.05
    done
    port=$(sed -nE 's/.*127\.0\.0\.1:([0-9]+).*/\1/p' "$work/ways")
}
# stop_server [PATTERN]: ends it, and checks the pool. A complaint in the server's log fails the
# test, unless it fits the pattern.
stop_server() {
    local status=0
    kill -TERM "$server"
    wait "$server" || status=$?
    server=''
    [ $status -eq 0 ] || fail "the server ended with status $status"
    ! grep -E ' (warning|error|critical) ' "$work/log" | grep -Ev "${1:-^$}" ||
        fail "the server complained"
    quietly wafer pool check "$pool"
}
uri() { echo "nbd+unix:///$1?socket=$socket"; }
tcp_uri() { echo "nbd://127.0.0.1:$port/$1"; }
# What of a volume is mapped, in bytes.
mapped() { wafer volume list "$pool" --json | jq ".[] | select(.name == \"$1\") | .mappedBytes"; }
# sparse_file FILE SIZE_MIB: data of all kinds of lengths at offsets of all kinds, and holes.
sparse_file() {
    local index=0 length
    truncate -s "$2M" "$1"
    for length in 1 8 128 2048 6144 24; do      # sectors
        dd if=/dev/urandom of="$1" bs=512 count=$length conv=notrunc status=none \
            seek=$((index * $2 * 2048 / 6 + index * 3))
        index=$((index + 1))
    done
}
digest() { sha256sum < "$1"; }
