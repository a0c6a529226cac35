# Sourced by the scripts that write to a folder which another run may be at work in.
# shellcheck shell=bash

# lslora_lock FD [wait] : locks the file that is open as FD, until this process and its children
# have closed it or ended, however that was; 1 if another process holds it. With wait, waits for it.
lslora_lock() {
    local python status=0
    python="$(command -v python3 || command -v python)" || return 0
    # flock(1) is not everywhere; the lock is the open file's, and so outlives this Python
    "$python" - "$@" <<'PYTHON' || status=$?
import sys
from fcntl import LOCK_EX, LOCK_NB, flock

try:
    flock(int(sys.argv[1]), LOCK_EX | (0 if "wait" in sys.argv else LOCK_NB))
except BlockingIOError:
    sys.exit(75)
except OSError as error:
    print(f"lslora: warning: no lock ({error}): see to it that no other run is at work here",
          file=sys.stderr)
PYTHON
    [ "$status" != 75 ]
}
