#!/usr/bin/env bash
# The full counts: what tests/run.sh runs, and what it leaves out. Each part's section of tests/PROOF.md is written
# anew: on which commit, with which seeds, how long, what came of it. Hours; exit 1 if anything failed.
#
#   tests/long.sh            all of it
#   tests/long.sh PART..     parts of tests/run.sh; the sections of the others stay as they are
#   LUNAR_SIM_SEEDS=N        sets of seeds of the simulator's storms, default 200
#   LUNAR_CUTS=N             power cuts, default 100 (tests/run.sh: 12)
#   PROPTEST_CASES=N         cases of each property, default 20000 (tests/run.sh: 256)
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export LUNAR_SIM_SEEDS=${LUNAR_SIM_SEEDS:-200} PROPTEST_CASES=${PROPTEST_CASES:-20000} LUNAR_CUTS=${LUNAR_CUTS:-100}
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(unit sim storms lab e2e matrix cuts mutants demo stock)
target=${CARGO_TARGET_DIR:-target}
proof=tests/PROOF.md
mkdir -p "$target"
[ -e "$proof" ] || printf '# Proof\n\nThe last full run of each part of `tests/long.sh`, written by it.\n' > "$proof"

failed=0
for part in "${parts[@]}"; do
  commit=$(git rev-parse --short=12 HEAD)
  [ -z "$(git status --porcelain | grep -v " $proof$")" ] || commit+=' with changes that are not committed'
  started=$(date -u +'%Y-%m-%d %H:%M UTC') start=$SECONDS
  rm -f "$target/test-results.tsv"
  tests/run.sh "$part" || failed=1
  # What did not begin (nothing could be installed, or no kernel built) says nothing: its section stays.
  [ -s "$target/test-results.tsv" ] || { echo "long: $part did not begin"; continue; }
  awk -v part="$part" '/^## / { skip = $2 == part } !skip' "$proof" > "$target/proof.md"
  {
    printf '\n## %s\n\n' "$part"
    printf -- '- commit %s, %s, %d minutes on %d CPUs\n' "$commit" "$started" $(((SECONDS - start + 30) / 60)) "$(nproc)"
    case $part in
      storms) printf -- '- %d sets of seeds: LUNAR_SIM_ROUND 1 to %d\n' "$LUNAR_SIM_SEEDS" "$LUNAR_SIM_SEEDS" ;;
      cuts) printf -- '- LUNAR_CUTS_SEED %d\n' "${LUNAR_CUTS_SEED:-1}" ;;&
      cuts | mutants) sed -nE 's/^([0-9]+ (cuts|checks) |unflushed writes|frozen at|caught )/- &/p' "$target/test-$part.log" ;;
      e2e | matrix) sed -nE 's/^figure: /- /p' "$target/test-$part.log" ;;
      unit) printf -- '- %d cases of each property\n' "$PROPTEST_CASES" ;;
    esac
    printf -- '- %d passed, %d failed, %d skipped\n' "$(grep -c $'\tpassed$' "$target/test-results.tsv")" \
      "$(grep -c $'\tfailed$' "$target/test-results.tsv")" "$(grep -c $'\tskipped$' "$target/test-results.tsv")"
    # Those of the storms and units are counted; the others have names that say something.
    case $part in
      storms | unit) grep -v $'\tpassed$' "$target/test-results.tsv" ;;
      *) cat "$target/test-results.tsv" ;;
    esac | sed -E 's/(.*)\t(.*)/    - \2: \1/'
  } | cat -s >> "$target/proof.md"
  cat -s "$target/proof.md" > "$proof"
done
exit "$failed"
