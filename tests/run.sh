#!/usr/bin/env bash
# Runs the tests. `tests/run.sh` runs all parts; `tests/run.sh PART..` only these:
#
#   fmt clippy docs    style and documentation, as the compiler's tools see it
#   unit               unit, property, simulator and tidy tests: nothing but a file system needed
#   tidy               only the house rules out of `unit` (not run twice by default)
#   sim                the simulator: the default seeds, kept runs, every planted bug, the write hole of each policy
#   lab                the machine harness itself
#   e2e                real /dev/ublkbN in a real kernel, see fixtures/lab.sh; of large matrices the corners
#   fuzz               readers of superblocks, maps, logs, configurations and calls, LUNAR_FUZZ_CASES (default 1000000) inputs each
#   cuts               power cuts, on disks with a volatile cache: LUNAR_CUTS (default 12) of them, and that bugs are found
#   demo               the README's demo, and that it fails, and where, when bytes are flipped behind Lunar's back
#
# Not run by default:
#   matrix             what e2e leaves out of its matrices: half an hour
#   storms             the simulator's storms with LUNAR_SIM_SEEDS (default 20) more sets of seeds
#   mutants            builds with a bug that the power cuts must find: tests/mutants.sh
#   stock              the demo on a stock Debian kernel in QEMU, emulated where KVM does not work: half an hour
#
# Each test's result goes to target/test-results.tsv (name<TAB>passed|failed|skipped). The last line is
# `N passed, N failed, N skipped`; exit 1 if any failed. No kernel for the lab: its parts are skipped, and say why.
# A new part: a function part_NAME, and its name in `parts`.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
parts=(fmt clippy docs unit sim lab e2e fuzz cuts demo)

export CARGO_TERM_COLOR=never
export RUST_BACKTRACE=${RUST_BACKTRACE:-1}
target=${CARGO_TARGET_DIR:-target}
if ! command -v cargo > /dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then
  PATH=$PATH:$HOME/.cargo/bin
fi

part_fmt() { cargo fmt --all --check; }
part_clippy() {
  cargo clippy --locked --workspace --all-targets -- -D warnings \
    && cargo clippy --locked -p lunar-engine -p lunar-tests --all-targets --features lunar-tests/planted -- -D warnings
}
part_docs() { RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --workspace --document-private-items; }
part_unit() {
  if cargo nextest --version > /dev/null 2>&1; then
    cargo nextest run --locked --workspace --no-fail-fast --no-tests=pass --status-level all --final-status-level fail \
      && cargo test --locked --workspace --doc --no-fail-fast
  else
    cargo test --locked --workspace --no-fail-fast
  fi
}
part_tidy() { cargo test --locked -p lunar-tests --test tidy; }
# Its binary has the engine's planted bugs in it, and lies apart from what serves anything.
part_sim() { tests/sim.sh --all; }
# A million inputs each, where `unit` has some thousands.
part_fuzz() {
  LUNAR_FUZZ_CASES=${LUNAR_FUZZ_CASES:-1000000} cargo test --locked -p lunar-engine -p mgmtd --test fuzz
}
part_lab() { fixtures/selftest.sh; }
# Boots once for each group of end-to-end tests: what one leaves behind in device-mapper does not meet the next.
e2e_groups() { # e2e_groups GROUP..: all tests whose names contain GROUP
  cargo build --locked --release --workspace || return 1
  if [ "${LUNAR_TEST_ON_HOST:-}" != 1 ]; then
    fixtures/kernel/find.sh > /dev/null || return 77
  fi
  # Five guests at once where they have memory: most of a test's time is waiting. A host has but one set of devices.
  local jobs=1
  if [ "${LUNAR_TEST_ON_HOST:-}" != 1 ] && [ "$(nproc)" -ge 2 ]; then
    jobs=$(awk '/^MemAvailable/ { n = int($2 / 4718592); print (n < 1 ? 1 : n > 5 ? 5 : n) }' /proc/meminfo)
  fi
  # This machine has more memory than those of the tests for want of it.
  [ "${LUNAR_TEST_ON_HOST:-}" != 1 ] || set -- "${@/#memory_/none_such}"
  LUNAR_E2E=$(realpath "$target")/release/lunar-e2e
  export LUNAR_E2E
  printf '%s\n' "$@" | xargs -P "$jobs" -I '{}' bash -c 'e2e_group {}'
}
# 16 RAM disks of 256 MiB take memory only as they are written; ext4-file members lie on the scratch disk.
e2e_group() {
  local log code start=$SECONDS limit=1800
  # The longest of the matrix needs half of it on a busy machine.
  [ -z "${LUNAR_E2E_LONG:-}" ] || limit=3600
  log=$(mktemp)
  local machine=(--mem 4G --ram-disks-kib 262144 --new-disk 8G)
  # Disks that take none of the little memory; what takes it is no finding, what hangs is.
  [ "$1" != memory_ ] || machine=(--mem 256M --new-disk 512M --new-disk 512M --new-disk 512M --allow 'page allocation (failure|stall)')
  fixtures/lab.sh --timeout "$limit" "${machine[@]}" --env "KUBLK=${KUBLK:-}" --env "LUNAR_OLDER=${LUNAR_OLDER:-}" \
    --env "LUNAR_E2E_LONG=${LUNAR_E2E_LONG:-}" -- "$LUNAR_E2E" "$1" > "$log" 2>&1
  code=$?
  # A guest that was cut short has results of some of its tests.
  grep -q '^test result: ' "$log" || echo "test ${1}_came_to_an_end ... FAILED" >> "$log"
  (flock 9 && cat "$log" && echo "$1: $((SECONDS - start)) s") 9>> "$LUNAR_E2E.lock"
  rm -f "$log"
  return "$code"
}
part_e2e() {
  # The long ones first, so that the guests end together.
  e2e_groups life_ crash_ import_ levels_ discard_ upgrade_ deaths_ data_file layout_ data_survives_member_vanish manage_ queues_ \
    replace_ data_survives_member_hang cli_ health_ metadata_ scrub_ spare_ resize_ grow_ data_verified data_survives_member_error \
    data_requests hostile_ config_ data_overlapping data_counters memory_
}
part_matrix() {
  local code=0
  # Not in a clone that is cut off (77): the tests that upgrade from it fail, and say so.
  LUNAR_OLDER=$(fixtures/older.sh) || { code=$?; [ "$code" = 77 ] || return "$code"; }
  export LUNAR_OLDER
  LUNAR_E2E_LONG=1 e2e_groups long_levels long_layout_raid0 long_layout_raid5 long_layout_raid10 long_layout_raid6 long_discard \
    long_data_survives_member_hang long_data_file long_data_survives_member_error long_data_survives_member_vanish long_data_requests \
    long_life long_crash long_replace long_grow long_queues long_resize long_upgrade
}
part_cuts() {
  [ "${LUNAR_TEST_ON_HOST:-}" != 1 ] || { echo "skipped: this machine's power is not cut"; return 77; }
  fixtures/kernel/find.sh > /dev/null || return 77
  cargo build --locked --release --workspace || return 1
  local cuts=$target/release/lunar-cuts seed=${LUNAR_CUTS_SEED:-1} code=0 log=$target/cuts.log bug
  "$cuts" --self-test || code=1
  "$cuts" --cuts "${LUNAR_CUTS:-12}" --seed "$seed" || code=1
  for bug in flush parity; do
    # What it says of the bug that it found is no failure.
    if "$cuts" --plant "$bug" --cuts 40 --seed "$seed" > "$log" 2>&1; then grep -E '^(caught|test) ' "$log"; else
      cat "$log"
      code=1
    fi
  done
  return "$code"
}
part_mutants() {
  [ "${LUNAR_TEST_ON_HOST:-}" != 1 ] || { echo "skipped: this machine's power is not cut"; return 77; }
  fixtures/kernel/find.sh > /dev/null || return 77
  tests/mutants.sh
}
part_demo() {
  if [ "${LUNAR_TEST_ON_HOST:-}" != 1 ]; then
    fixtures/kernel/find.sh > /dev/null || return 77
  fi
  local log=$target/demo.log want break code=0
  if fixtures/demo.sh > "$log" 2>&1; then echo 'test demo_passes ... ok'; else
    cat "$log"
    echo 'test demo_passes ... FAILED'
    code=1
  fi
  # Given bytes flipped in one place, when the demo runs, then it exits non-zero and names the step that read them.
  for break in data=3 parity=6 rebuild=5; do
    want="FAILED in step: ${break#*=}."
    if DEMO_BREAK=${break%=*} DEMO_TREE=/usr/include/linux fixtures/demo.sh > "$log" 2>&1 \
      || ! grep -qF "$want" "$log" || ! grep -qF 'files are not what was written' "$log"; then
      cat "$log"
      echo "expected: exit other than 0, and \`$want\`"
      echo "test demo_fails_on_flipped_${break%=*} ... FAILED"
      code=1
    else
      echo "test demo_fails_on_flipped_${break%=*} ... ok"
    fi
  done
  return "$code"
}
part_storms() {
  local round code=0
  for ((round = 1; round <= ${LUNAR_SIM_SEEDS:-20}; round++)); do
    if LUNAR_SIM_ROUND=$round cargo test --locked -q -p lunar-engine --test group -- --test-threads 2 write_and_read_equal_the_model \
      member_lost_under_writes_then killed_process_loses_nothing > "$target/storm.log" 2>&1; then
      echo "test storms_round_$round ... ok"
    else
      cat "$target/storm.log"
      echo "test storms_round_$round ... FAILED"
      code=1
    fi
  done
  return "$code"
}
part_stock() {
  local log=$target/stock.log
  LUNAR_KERNEL=stock DEMO_TREE=/usr/include/linux DEMO_TIMEOUT=3600 fixtures/demo.sh > "$log" 2>&1
  case $? in
    0) echo 'test stock_kernel_runs_the_demo ... ok' ;;
    77) tail -n 2 "$log"; return 77 ;;
    *) cat "$log"; echo 'test stock_kernel_runs_the_demo ... FAILED'; return 1 ;;
  esac
}
declare -A limits=([unit]=30m [sim]=30m [lab]=10m [e2e]=60m [stock]=70m [storms]=6h [matrix]=3h [cuts]=3h [mutants]=1h) # the others: 20m

# Reads the output of cargo test, nextest, libtest-mimic or the lab's self-test; prints name<TAB>status.
# A name is BINARY::TEST for cargo's tests, so that it is the same under nextest.
test_results() {
  awk '
    function binary(path) { sub(/.*[\/:]/, "", path); sub(/-[0-9a-f]+\)?$/, "", path); gsub(/_/, "-", path); return path }
    function put(name, status) { if (!(name in seen)) order[++n] = name; seen[name] = status }
    $1 == "Running" && /\(.*\)$/ { prefix = binary($NF) "::"; next }
    $1 == "Doc-tests" { prefix = binary($2 "-0") "::doc::"; next }
    /^ +(PASS|LEAK|FAIL|LEAK-FAIL|ABORT|TIMEOUT|SIG[A-Z0-9]+|SKIP) +\[/ {
      status = $1
      name = $0; sub(/^[^\]]*\] +/, "", name); sub(/^\([^)]*\) +/, "", name)
      test = name; sub(/^[^ ]+ +/, "", test); sub(/ .*/, "", name)
      put(binary(name) "::" test, status ~ /^(PASS|LEAK)$/ ? "passed" : status == "SKIP" ? "skipped" : "failed")
      next
    }
    /^test .* \.\.\. *(ok|FAILED|failed|ignored)/ {
      name = $0; sub(/^test +/, "", name); status = name
      sub(/ +\.\.\. .*/, "", name); sub(/^.* \.\.\. +/, "", status)
      put(prefix name, status ~ /^ok/ ? "passed" : status ~ /^ignored/ ? "skipped" : "failed")
    }
    END { for (i = 1; i <= n; i++) print order[i] "\t" seen[order[i]] }
  ' "$1"
}

selected=("$@")
[ ${#selected[@]} -gt 0 ] || selected=("${parts[@]}")
for part in "${selected[@]}"; do
  declare -F "part_$part" > /dev/null || { echo "no part $part. Try: tests/run.sh ${parts[*]}"; exit 2; }
done

fixtures/setup.sh --for tests || exit 1
mkdir -p "$target"
results=$target/test-results.tsv
: > "$results"

export -f "${parts[@]/#/part_}" part_tidy part_matrix part_storms part_stock part_mutants e2e_groups e2e_group
export target
summary=''
for part in "${selected[@]}"; do
  echo "== $part"
  log=$target/test-$part.log
  start=$SECONDS
  timeout -k 10 "${limits[$part]:-20m}" bash -c "part_$part" < /dev/null 2>&1 | tee "$log"
  code=${PIPESTATUS[0]}
  test_results "$log" > "$log.tsv"
  case $code in
    0) [ -s "$log.tsv" ] || printf '%s\tpassed\n' "$part" >> "$log.tsv" ;;
    77) printf '%s\tskipped\n' "$part" >> "$log.tsv" ;;
    *)
      # The part failed as a whole: it did not compile, or was cut short, or the kernel warned.
      if ! grep -q $'\tfailed$' "$log.tsv" || [ "$code" -ge 124 ]; then
        printf '%s (exit %s)\tfailed\n' "$part" "$code" >> "$log.tsv"
      fi
      ;;
  esac
  cat "$log.tsv" >> "$results"
  summary+=$(printf '%-8s %5.1f min  %4d passed %4d failed %4d skipped' "$part" "$(((SECONDS - start) * 10 / 60))e-1" \
    "$(grep -c $'\tpassed$' "$log.tsv")" "$(grep -c $'\tfailed$' "$log.tsv")" "$(grep -c $'\tskipped$' "$log.tsv")")$'\n'
  rm -f "$log.tsv"
done

printf '\n%s' "$summary"
for status in failed skipped; do
  grep -q $'\t'"$status"'$' "$results" && { echo "$status:"; sed -n "s/\t$status\$//p" "$results" | sed 's/^/  /'; }
done
failed=$(grep -c $'\tfailed$' "$results")
printf '%d passed, %d failed, %d skipped\n' "$(grep -c $'\tpassed$' "$results")" "$failed" "$(grep -c $'\tskipped$' "$results")"
[ "$failed" = 0 ]
