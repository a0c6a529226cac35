# Thirty languages of FLORES-101 and all 870 directions between them, for the scripts of
# examples/flores12. In a shell of its own:
#   source examples/flores30/settings.sh
#   bash examples/flores12/download.sh
#   bash examples/flores12/prepare.sh
#   bash examples/flores12/finetune.sh       # with the authors' settings
#   bash examples/flores12/evaluate.sh
#   bash examples/flores12/learn_architecture.sh
# The authors' own list of thirty languages was not known to us. This one is our choice: their
# twelve, and six more for each tier, from several families and scripts.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export WORK="${WORK:-$ROOT/flores30_work}" # MODEL_DIR and FLORES_DIR name copies that are there
TIERS='high=en,fr,it,de,cs,es,pl,pt,ru,sv'
TIERS+=';medium=nl,zh,ja,ko,ar,hi,id,tr,uk,vi'
TIERS+=';low=oc,or,sd,wo,ff,ig,km,lo,ps,yo'
export TIERS
export BUDGET="${BUDGET:-38338560}" # of learn_architecture.sh: what ranks 2, 2 and 8 have
