# What the recipes share. They source it, with RECIPE and ROOT set; it does nothing by itself.
# shellcheck shell=bash

# shellcheck source=../scripts/lock.sh
source "$ROOT/scripts/lock.sh"

fail() {
    echo "$RECIPE: error: $*" >&2
    exit 1
}

# lock FOLDER : fails if another run is at work in it; holds until this script and what it has
# started have ended
lock() {
    exec 9>>"$1/.lock"
    lslora_lock 9 || fail "another run is at work in $1: wait for its end, or stop it"
}

# checksum FILE... : of their contents
checksum() {
    cat "$@" | cksum
}

# package_checksum : of what of this package runs
package_checksum() {
    (cd "$ROOT" && find lslora_fairseq -name '*.py' | LC_ALL=C sort | tr '\n' '\0' |
        xargs -0 cksum) | cksum
}
