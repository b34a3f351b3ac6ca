# shellcheck shell=bash
# Sourced first by every test in Tests/Host: a folder of its own, a pool, a server on it.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
wafer=${WAFER_UNDER_TEST:?start it as Tests/Host/run NAME}
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/host-test.XXXXXX")
pool=$work/pool server=''
clean_up() {
    [ -z "$server" ] || { kill -9 "$server" 2>/dev/null || true; wait "$server" || true; }
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

fail() { echo "FAIL: $*"; exit 1; }
# until_true SECONDS COMMAND...
until_true() {
    local end=$((SECONDS + $1)); shift
    until "$@"; do [ $SECONDS -lt "$end" ] || return 1; sleep 0.1; done
}
start_server() {
    "$wafer" serve "$pool" "$@" > "$work/serve.out" 2> "$work/serve.log" &
    server=$!
    until_true 20 grep -qs '^listening on ' "$work/serve.out" ||
        { cat "$work/serve.log"; fail "the server does not listen"; }
}
stop_server() {
    local status=0
    kill -TERM "$server"
    wait "$server" || status=$?
    server=''
    [ $status -eq 0 ] || { cat "$work/serve.log"; fail "the server ended with status $status"; }
}
uri() { echo "nbd+unix:///$1?socket=$pool/nbd.sock"; }
# The metadata by our check and by both generations of dm-thin's.
check_metadata() {
    "$wafer" pool check "$pool"
    local release
    for release in bookworm trixie; do
        "$checkout/Scripts/thin-tools" $release thin_check "$pool/metadata" ||
            fail "thin_check of $release"
    done
}
