#!/usr/bin/env bash
# The full counts: what tests/run.sh runs in its corners, here whole. Writes what was run, on which commit, with
# which seeds and how long it took to tests/PROOF.md, whatever comes of it. Hours; exit 1 if anything failed.
#
#   tests/long.sh            all of it
#   tests/long.sh PART..     parts of tests/run.sh, `stock` included
#   LUNAR_SIM_SEEDS=N        sets of seeds of the simulator's storms, default 200
#   PROPTEST_CASES=N         cases of each property, default 20000 (tests/run.sh: 256)
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export LUNAR_SIM_SEEDS=${LUNAR_SIM_SEEDS:-200} PROPTEST_CASES=${PROPTEST_CASES:-20000} LUNAR_E2E_LONG=1
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(unit storms lab e2e demo stock)

commit=$(git rev-parse --short=12 HEAD)
[ -z "$(git status --porcelain)" ] || commit+=' with changes that are not committed'
started=$(date -u +'%Y-%m-%d %H:%M UTC')
log=${CARGO_TARGET_DIR:-target}/long.log
mkdir -p "$(dirname "$log")"
tests/run.sh "${parts[@]}" 2>&1 | tee "$log"
code=${PIPESTATUS[0]}

{
  echo '# Proof'
  echo
  echo 'The last full run of `tests/long.sh`, written by it.'
  echo
  echo "- commit: $commit"
  echo "- started: $started, on $(nproc) CPUs"
  echo "- simulator storms: $LUNAR_SIM_SEEDS sets of seeds; properties: $PROPTEST_CASES cases each; end to end: whole matrices"
  echo "- exit code: $code"
  echo
  echo '```'
  # From the summary on: minutes and counts of each part, what failed or was skipped, the sum.
  awk '/^[a-z0-9]+ +[0-9.]+ min +[0-9]+ passed/ { on = 1 } on' "$log"
  echo '```'
  echo
  echo 'Tests that ran:'
  echo
  echo '```'
  sed 's/\t/  /' "${CARGO_TARGET_DIR:-target}/test-results.tsv"
  echo '```'
} > tests/PROOF.md
exit "$code"
