# shellcheck shell=bash
# Sourced first by what the tests run inside the guest: a pool on the disks /dev/d0 (metadata) and
# /dev/d1 (data), a server on it, its volumes as /dev/nbdN.
set -euo pipefail
export PATH=/payload/bin:$PATH DM_DISABLE_UDEV=1
pool=/scratch/pool server=''

# A test that fails or hangs tells what the server said and where the kernel stands.
patience=200
dmesg --clear                                   # of the start, nobody wants to read
tell_all() {
    if [ -e /scratch/serve.log ]; then echo "the server's log:"; tail -n 40 /scratch/serve.log; fi
    if [ -n "$server" ] && ! kill -0 "$server" 2>/dev/null; then echo "the server is gone"; fi
    dmesg | tail -n 20
}
tell_the_hung() {
    local task
    echo "no end after $patience s; waiting in the kernel:"
    for task in /proc/[0-9]*/task/[0-9]*; do
        [ "$(cut -d' ' -f3 "$task/stat" 2>/dev/null)" = D ] || continue
        echo "$(cat "$task/comm"):"; head -n 8 "$task/stack"
    done
}
trap 'status=$?; [ $status -eq 0 ] || tell_all; exit $status' EXIT
(sleep $patience; tell_the_hung; tell_all) &

fail() { echo "FAIL: $*"; exit 1; }
step() { local up; read -r up _ < /proc/uptime; echo "[$up] $*"; }
# Output that matters only when the command fails.
quietly() {
    local log=/tmp/quietly.$BASHPID
    "$@" > "$log" 2>&1 || { cat "$log"; fail "$*"; }
}
# until_true SECONDS COMMAND...: tries again and again, gives up after the time.
until_true() {
    local end=$((SECONDS + $1)); shift
    until "$@"; do [ $SECONDS -lt $end ] || return 1; sleep 0.2; done
}

# --- pool and server  --------------------------------
create_pool() { quietly wafer pool create $pool --metadata /dev/d0 --data /dev/d1 "$@"; }
# The folder is gone after a power cut, the disks are not; all it says is which disks they are.
find_pool_again() { mkdir -p $pool; ln -s /dev/d0 $pool/metadata; ln -s /dev/d1 $pool/data; }

start_server() {
    rm -f /scratch/serve.out                    # what the last one said is not this one's word
    wafer serve $pool "$@" > /scratch/serve.out 2> /scratch/serve.log &
    server=$!
    until_true 20 grep -qs '^listening on ' /scratch/serve.out ||
        { cat /scratch/serve.log; fail "the server does not listen"; }
}
stop_server() {
    local status=0
    kill -TERM "$server"
    wait "$server" || status=$?
    [ $status -eq 0 ] || { cat /scratch/serve.log; fail "the server ended with status $status"; }
    server=''
}
# How many data blocks are in use.
used_blocks() { wafer pool status $pool --json | jq .dataBlocksUsed; }
used_at_most() { [ "$(used_blocks)" -le "$1" ]; }
# The thin device behind a volume.
device_id() { wafer volume list $pool --json | jq -r --arg n "$1" '.[] | select(.name == $n).id'; }

# --- the kernel's client  --------------------------------
# attach N VOLUME [nbd-client option...]
attach() {
    local device=/dev/nbd$1 volume=$2; shift 2
    quietly nbd-client -unix $pool/nbd.sock "$device" -N "$volume" -b 4096 "$@"
    until_true 5 has_size "$device" || fail "$device has no size"
}
has_size() { [ "$(cat "/sys/block/${1#/dev/}/size")" -gt 0 ]; }
detach() { quietly nbd-client -d "/dev/nbd$1"; }
drop_caches() { sync; echo 3 > /proc/sys/vm/drop_caches; }
digest() { md5sum < "$1" | cut -d' ' -f1; }

# --- dm-thin on the same disks  --------------------------------
# dm_start_pool [BLOCK_SECTORS]: an empty metadata disk becomes a new pool, another one is opened.
dm_start_pool() {
    local block=${1:-128} sectors
    sectors=$(blockdev --getsz /dev/d1)
    quietly dmsetup create pool --table \
        "0 $((sectors / block * block)) thin-pool /dev/d0 /dev/d1 $block 0"
}
dm_message() { quietly dmsetup message pool 0 "$@"; }
# dm_thin NAME ID BYTES: the thin device ID as /dev/mapper/NAME
dm_thin() { quietly dmsetup create "$1" --table "0 $(($3 / 512)) thin /dev/mapper/pool $2"; }
dm_stop() { quietly dmsetup remove --retry "$@"; }
