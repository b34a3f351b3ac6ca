# shellcheck shell=bash
# Debian packages of a chosen release, unpacked without installing them and without root.
#
# Sourced by the scripts that need files from a release other than the host's. Each release gets
# its own apt configuration under the cache; the host's sources, lists and status are only read.
# The mirror is whichever one the host's apt uses, so no server is named here.

# Everything downloaded or built from packages lives here; it can be deleted at any time.
cache_root() {
    local checkout
    checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    realpath -m "${WAFER_CACHE:-$checkout/.cache}"
}

die() { echo "$(basename "$0"): $*" >&2; exit 1; }

# debian_mirrors: the archives the host's apt reads, one "URI suite" a line. Works before the first
# `apt-get update`, because it asks for the release files' addresses and not for what was fetched.
debian_mirrors() {
    apt-get --print-uris update 2>/dev/null |
        sed -nE "s#^'([^']*)/dists/(.*)/InRelease'.*#\1 \2#p" | sort -u
}

# debian_apt RELEASE: writes the release's private apt configuration, fetches its package lists when
# there are none of this day, and prints the configuration's path.
debian_apt() {
    local release=$1 dir mirror security
    dir=$(cache_root)/apt/$release
    mkdir -p "$dir"/{lists/partial,cache/archives/partial}
    # One release at a time: two scripts may start side by side on an empty cache.
    exec 9> "$dir/lock"; flock 9
    if [ ! -e "$dir/updated" ] || [ -n "$(find "$dir/updated" -mtime +0)" ]; then
        mirror=$(debian_mirrors | awk '$2 !~ /security/ && $1 ~ /debian/ {print $1; exit}')
        security=$(debian_mirrors | awk '$2 ~ /security/ && $1 ~ /debian/ {print $1; exit}')
        [ -n "$mirror" ] || die "this host's apt has no Debian mirror to take $release from"
        {
            local key='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]'
            echo "deb $key $mirror $release main"
            echo "deb $key $mirror $release-updates main"
            [ -z "$security" ] || echo "deb $key $security $release-security main"
        } > "$dir/sources.list"
        cat > "$dir/apt.conf" <<CONF
Dir::Etc::sourcelist "$dir/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State::lists "$dir/lists";
Dir::State::status "/dev/null";
Dir::Cache "$dir/cache";
APT::Install-Recommends "0";
APT::Sandbox::User "root";
CONF
        APT_CONFIG=$dir/apt.conf apt-get -qq update >&2 ||
            die "cannot fetch the package lists of $release"
        touch "$dir/updated"
    fi
    flock -u 9; exec 9>&-
    printf '%s\n' "$dir/apt.conf"
}

# debian_closure CONF PACKAGE...: the packages and everything they depend on, as if nothing were
# installed, so the answer does not depend on the host. Without what only maintainer scripts use.
debian_closure() {
    local conf=$1; shift
    APT_CONFIG=$conf apt-get -s install "$@" |
        awk '/^Inst/ {print $2}' | grep -vE '^(perl|libperl|usrmerge|debconf)'
}

# debian_download CONF DIR PACKAGE...: the .deb files, verified by apt, into DIR.
debian_download() {
    local conf=$1 dir=$2; shift 2
    mkdir -p "$dir"
    (cd "$dir" && APT_CONFIG=$conf apt-get -qq download "$@" >&2)
}

# debian_unpack ROOT DEB...: unpacks into ROOT with /bin, /lib, /sbin merged into /usr, whether the
# package was built for that (Debian 13) or not (Debian 12).
debian_unpack() {
    local root=$1 link deb; shift
    mkdir -p "$root"/usr/{bin,sbin,lib,lib64}
    for link in bin sbin lib lib64; do
        [ -L "$root/$link" ] || ln -s "usr/$link" "$root/$link"
    done
    for deb in "$@"; do
        dpkg-deb --fsys-tarfile "$deb" |
            tar -C "$root" -x --keep-directory-symlink --no-same-owner \
                --exclude './usr/share/doc/*' --exclude './usr/share/man/*' \
                --exclude './usr/share/locale/*' --exclude './usr/share/perl*' \
                --exclude './usr/lib/x86_64-linux-gnu/perl*' --exclude './var/lib/*'
    done
}

# debian_programs HOME RELEASE PROGRAMS PACKAGE...: the release's packages and all that they depend
# on, unpacked into HOME/root, and HOME/bin/PROGRAM for every program that fits one of the patterns
# in PROGRAMS (relative to /usr): wrappers that start it with its own loader and libraries. Does
# nothing when a HOME with the same packages and programs is there.
debian_programs() {
    local home=$1 release=$2 programs=$3 conf new program pattern content; shift 3
    local -a packages
    content="$(declare -f debian_unpack debian_programs debian_wrapper | cksum) $programs $*"
    mkdir -p "$(dirname "$home")"
    exec 8> "$home.lock"; flock 8
    if [ "$(cat "$home/content" 2>/dev/null)" != "$content" ]; then
        echo "$(basename "$0"): fetching the programs of $release" >&2
        new=$home.new
        conf=$(debian_apt "$release")
        mapfile -t packages < <(debian_closure "$conf" "$@" libc-bin)
        [ "${#packages[@]}" -gt "$#" ] || die "apt does not know all of this in $release: $*"
        rm -rf "$new"
        debian_download "$conf" "$new/packages" "${packages[@]}"
        debian_unpack "$new/root" "$new"/packages/*.deb
        rm -rf "$new/packages"
        mkdir -p "$new/bin"
        for pattern in $programs; do
            for program in "$new/root/usr"/$pattern; do
                [ -e "$program" ] || die "$release has no $pattern in these packages: $*"
                [ "$(head -c 4 "$program" | tr -d '\0')" = $'\x7fELF' ] || continue
                debian_wrapper "${program#"$new/root/"}" > "$new/bin/${program##*/}"
                chmod +x "$new/bin/${program##*/}"
            done
        done
        printf '%s\n' "$content" > "$new/content"
        rm -rf "$home"; mv "$new" "$home"
    fi
    flock -u 8; exec 8>&-
}

# debian_wrapper PROGRAM: the text of a script beside root/ that starts root/PROGRAM. It is called by
# its whole path: Python looks for its modules from there. Ceph's libraries (fio has them) would look
# for their own at the host's.
debian_wrapper() {
    cat <<WRAPPER
#!/bin/sh
root=\$(dirname "\$(readlink -f "\$0")")/../root
libraries=\$root/usr/lib/x86_64-linux-gnu
exec "\$root/usr/lib64/ld-linux-x86-64.so.2" \\
    --library-path "\$libraries:\$libraries/ceph" "\$root/$1" "\$@"
WRAPPER
}
