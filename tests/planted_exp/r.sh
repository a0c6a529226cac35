export PYTHONPATH=/tmp/wt-planted:/tmp/wt-planted/tests OMP_NUM_THREADS=1 PATH=/work/main/.venv/bin:$PATH
r() { echo "== $*"; nice -n 5 python /tmp/planted_exp/exp2.py "$@" 2>/tmp/planted_exp/err || tail -3 /tmp/planted_exp/err; }
