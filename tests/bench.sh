#!/usr/bin/env bash
# Measures Lunar beside md, kublk and rublk in one boot of the lab, as ratios of interleaved runs.
#
#   tests/bench.sh [OPTIONS] [SET..]
#   --rounds N        rounds of every workload on every target, default 5
#   --seconds N       length of one run, default 1
#   --members KIND    ram (default) or null_blk (200 us latency, volatile cache)
#   --mib N           size of one member, default 320
#   --workloads LIST  comma-separated, default what the set has of: read4k write4k read4k-4j write4k-4j (4 jobs)
#                     read1m write1m qd1read qd1write qd1sync
#   --out DIR         where the CSVs go, default tests/bench
#   --beside DIR      another build of Lunar (its target/release) as one more target, for before and after
#   --all             every set on ram members, then those with md in them on null_blk members, then the report
#   --report          measures nothing: writes the tables of tests/BENCHMARKS.md anew from the CSVs
#   SET..             raid0 raid10 raid5 raid6 bitmap ppl linear degraded rebuild recover null loop; default all
#
# Only ratios mean anything: absolute numbers swing by a factor of two on shared cores. Each round runs the
# workload once on every target, the order turned by one, and ratios are taken within a round. Every round is a
# row of tests/bench/SET-MEMBERS.csv; cpu_us is the time on a CPU of the target's server for one I/O.
# Some rows are other figures in the column iops: `rebuild` MiB/s of one member, `resident` MiB, `idle` CPU
# microseconds in a second, `recover16` milliseconds from SIGKILL of ublk-target to the first I/O of the slowest of 16
# LUs. What has to be reached: tests/bench/goals.txt. A peer that is not there is left out and named:
#   KUBLK=FILE        the kernel's own ublk server; rublk: see fixtures/peers.sh
set -u -o pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$root/tests/bench
release=$(realpath -m "${CARGO_TARGET_DIR:-$root/target}/release")

usage() { sed -n '2,/^set -u/s/^# \{0,1\}//p' "$0"; }
bad_usage() { echo "bench: $*"; echo 'Try: tests/bench.sh --help'; exit 2; }
all_sets=(raid0 raid10 raid5 raid6 bitmap ppl linear degraded rebuild recover null loop)
md_sets=(raid0 raid10 raid5 raid6 bitmap ppl degraded rebuild)
in_guest='' all='' beside='' report='' rounds=5 seconds=1 members=ram mib=320 workloads='' sets=()
while [ $# -gt 0 ]; do
  case $1 in
    --guest) in_guest=1 ;;
    --rounds) rounds=${2:?}; shift ;;
    --seconds) seconds=${2:?}; shift ;;
    --members) members=${2:?}; shift ;;
    --mib) mib=${2:?}; shift ;;
    --workloads) workloads=$2; shift ;;
    --out) out=$(realpath -m "${2:?}"); shift ;;
    --beside) beside=${2:+$(realpath -m "$2")}; shift ;;
    --all) all=1 ;;
    --report) report=1 ;;
    -h | --help) usage; exit 0 ;;
    -*) bad_usage "unknown option $1" ;;
    *) sets+=("$1") ;;
  esac
  shift
done
[ ${#sets[@]} -gt 0 ] || sets=("${all_sets[@]}")
# shellcheck source=bench/targets.sh
. "$root/tests/bench/targets.sh"

# ---------------------------------------------------------------------------------------------------
# One set: its targets live side by side, each on members of its own.

next_member=0
spare=() # made for a target that then could not be had
take() { # take COUNT: unused members into the array `taken`
  taken=("${spare[@]:0:$1}")
  spare=("${spare[@]:$1}")
  while [ ${#taken[@]} -lt "$1" ]; do
    taken+=("$(member_make "$members" "$next_member" "$mib")") || return 1
    next_member=$((next_member + 1))
  done
}

targets=()
declare -A members_of=()
add() { # add NAME COUNT COMMAND..: makes a target on COUNT members; leaves it out if it cannot be had
  local name=$1 count=$2 device code
  shift 2
  take "$count" || { echo "bench: no members left for $name"; exit 1; }
  device=$("$@" "${taken[@]}" 2> /tmp/reason)
  code=$?
  if [ "$code" = 0 ] && [ -b "$device" ]; then
    targets+=("$name=$device")
    members_of[$name]="${taken[*]}"
  else
    echo "bench: left out: $(tail -n 1 /tmp/reason)"
    spare+=("${taken[@]}")
  fi
}

raid_workloads=read4k,write4k,read4k-4j,write4k-4j,read1m,write1m,qd1read,qd1write,qd1sync
declare -A workloads_of=([degraded]=read4k,read1m,write4k [null]=read4k,write4k [loop]=read4k)

set_raid0() {
  add_lunar raid0 4
  add md 4 make_md 0 - 0
  add kublk-stripe 4 make_kublk stripe
}
set_raid10() {
  add_lunar raid10 4
  add md 4 make_md 10 resync 0
  add kublk-loop 1 make_kublk loop
}
set_parity() { # set_parity LEVEL: Lunar's policy here is none, which is md's resync
  add_lunar "raid$1" 4
  add_md "$1" 4
  add kublk-loop 1 make_kublk loop
}
set_raid5() { set_parity 5; }
set_raid6() { set_parity 6; }
set_policy() { # set_policy POLICY: raid5 beside md's of the same policy, and beside one without
  add_lunar "raid5:$1" 4
  add "md-$1" 4 make_md 5 "$1" 0
  add none 4 lunar_make 1 raid5
}
set_bitmap() { set_policy bitmap; }
set_ppl() { set_policy ppl; }
set_linear() {
  add_lunar linear 1
  add raw 1 make_raw
  add kublk-loop 1 make_kublk loop
  add rublk-loop 1 make_rublk
}
set_null() { add kublk-null 0 make_kublk null; }
set_loop() { # the same four members for both: ublk-target's ring and executor alone, and fio
  take 4 || exit 1
  targets+=("bench-loop=$(IFS=:; echo "${taken[*]}")" "fio=$(IFS=:; echo "${taken[*]}")")
}
set_degraded() { # the second member of each is away
  add lunar 4 lunar_make 1 raid5
  add_md 5 4
}
set_rebuild() {
  add lunar 4 lunar_make 1 raid5
  add_md 5 4
}
set_recover() {
  take 1 || exit 1
  lunar 1 disk add "${taken[@]}" > /tmp/lunar.log 2>&1 && lunar 1 group create many --level raid0 --disks "${taken[@]}" > /tmp/lunar.log 2>&1 \
    || { echo "bench: left out: $(tail -n 1 /tmp/lunar.log)"; return; }
  local i
  for i in {1..16}; do
    lunar 1 lu create "many$i" --group many --size 8MiB > /tmp/lunar.log 2>&1 || { echo "bench: left out: $(tail -n 1 /tmp/lunar.log)"; return; }
  done
  targets+=("lunar=$(readlink -f /dev/lunar/1/many1)")
}

tear_down() {
  local pair
  lunar_remove
  for pair in "${targets[@]}"; do
    case ${pair#*=} in /dev/md*) mdadm --stop "${pair#*=}" > /dev/null 2>&1 ;; esac
  done
  [ -x "${KUBLK:-}" ] && "$KUBLK" del -a > /dev/null 2>&1
  [ -x "${RUBLK:-}" ] && "$RUBLK" del -a > /dev/null 2>&1
  [ "$members" = ram ] && for ((i = 0; i < next_member; i++)); do
    dd if=/dev/zero of="/dev/ram$i" bs=1M count=1 oflag=direct status=none # no superblock for the next set to find
    blkdiscard -f "/dev/ram$i" 2>/dev/null
  done
  members_remove
  targets=()
  members_of=()
  spare=()
  next_member=0
}

# ---------------------------------------------------------------------------------------------------
# Measuring.

workload_args() { # workload_args NAME: the fio options
  case $1 in
    read4k) echo '--rw=randread --bs=4k --iodepth=32' ;;
    write4k) echo '--rw=randwrite --bs=4k --iodepth=32' ;;
    read4k-4j) echo '--rw=randread --bs=4k --iodepth=32 --numjobs=4 --group_reporting' ;;
    write4k-4j) echo '--rw=randwrite --bs=4k --iodepth=32 --numjobs=4 --group_reporting' ;;
    read1m) echo '--rw=read --bs=1M --iodepth=8' ;;
    write1m) echo '--rw=write --bs=1M --iodepth=8' ;;
    qd1read) echo '--rw=randread --bs=4k --iodepth=1' ;;
    qd1write) echo '--rw=randwrite --bs=4k --iodepth=1' ;;
    qd1sync) echo '--rw=randwrite --bs=4k --iodepth=1 --fdatasync=1' ;;
    *) bad_usage "unknown workload $1" ;;
  esac
}

fio_extra=() # further options of fio
run_round() { # run_round WORKLOAD NAME=DEVICE..: one after the other in one fio; rows of NAME,iops,kib_s,p50_us,p99_us,cpu_us
  local args pair name pid names='' jobs=()
  read -ra args <<< "$(workload_args "$1")"
  for pair in "${@:2}"; do
    name=${pair%%=*}
    pid=$(server_pid "$name")
    names+=" $name"
    jobs+=(--name="$name" --filename="${pair#*=}" --stonewall)
    # fio writes what these say to NAME.prerun.txt and NAME.postrun.txt.
    [ -z "$pid" ] || jobs+=(--exec_prerun="$(cpu_command "$pid")" --exec_postrun="$(cpu_command "$pid")")
    rm -f "/tmp/$name".{pre,post}run.txt
  done
  # Terse version 3: read fields from 6 (KiB/s 7, IOPS 8, percentiles 18-37), write the same 41 fields later.
  (cd /tmp && fio --direct=1 --ioengine=io_uring --time_based --runtime="$seconds" --ramp_time=0.3 --norandommap --randrepeat=0 \
    --thread --eta=never --output-format=terse --terse-version=3 "${args[@]}" "${fio_extra[@]}" "${jobs[@]}" 2> fio.err) \
    | awk -F';' '$1 == 3 && $5 == 0 {
        base = $8 > 0 ? 0 : 41
        for (i = 18 + base; i <= 37 + base; i++) { split($i, pair, "%="); of[pair[1] + 0] = pair[2] }
        print $3 "," $(8 + base) "," $(7 + base) "," of[50] "," of[99]
      }' > /tmp/round.csv
  for name in $names; do
    # fio's 0.3 s of ramp are in the time too.
    awk -F, -v name="$name" -v us="$(($(cpu_us "/tmp/$name.postrun.txt") - $(cpu_us "/tmp/$name.prerun.txt")))" -v seconds="$seconds" '
      $1 == name && us > 0 && $2 >= 1 { printf "%s,%.1f\n", $0, us / ($2 * (seconds + 0.3)); next }
      $1 == name { print $0 "," }' /tmp/round.csv
  done
}

csv='' # where the rows of the set at hand go
put() { # put WORKLOAD ROUND TARGET ROW
  [ -n "$4" ] || { echo "bench: no result of $3 at $1: $(tail -n 1 /tmp/fio.err)"; return 1; }
  echo "$1,$2,$3,$4" >> "$csv"
}
put_round() { # put_round WORKLOAD ROUND NAME=DEVICE..
  local rows pair
  rows=$(run_round "$1" "${@:3}")
  for pair in "${@:3}"; do
    put "$1" "$2" "${pair%%=*}" "$(sed -n "s/^${pair%%=*},//p" <<< "$rows")" || return 1
  done
}
progress() { "$release/lunar-bench-report" progress "$csv" "$1"; }

fill() { # no target pays for memory that others have, none reads what was never written
  local pair device
  for pair in "${targets[@]}"; do
    for device in $(tr : ' ' <<< "${pair#*=}"); do
      fio --name=fill --filename="$device" --rw=write --bs=1M --iodepth=4 --direct=1 --ioengine=io_uring --refill_buffers > /tmp/fill.log 2>&1 \
        || { echo "bench: cannot fill $device: $(tail -n 1 /tmp/fill.log)"; return 1; }
    done
  done
}

each() { # each ROUND: the targets, the order turned by one each round
  local i count=${#targets[@]}
  for ((i = 0; i < count; i++)); do
    printf '%s\n' "${targets[(i + $1) % count]}"
  done
}

measure_fio() { # measure_fio LIST: all rounds of workloads
  local workload round order
  for workload in ${1//,/ }; do
    for ((round = 1; round <= rounds; round++)); do
      mapfile -t order < <(each "$round")
      put_round "$workload" "$round" "${order[@]}" || return 1
    done
    progress "$workload"
  done
}
measure_loop() { # fio as the loop does it: registered files and buffers, completions in batches
  local round fio_extra=(--iodepth=128 --iodepth_batch_complete_min=1 --iodepth_batch_complete_max=128 --fixedbufs=1 --registerfiles=1)
  for ((round = 1; round <= rounds; round++)); do
    put read4k "$round" bench-loop "$("$release/ublk-target" bench-loop --depth 32 --seconds "$seconds" "${taken[@]}" 2> /tmp/fio.err \
      | awk '{ printf "%d,%d,,,\n", $1, $1 * 4 }')" || return 1
    put read4k "$round" fio "$(run_round read4k "${targets[1]}" | cut -d, -f2-)" || return 1
  done
  progress read4k
}
measure_linear() {
  local round
  measure_fio "$1" || return 1
  for ((round = 1; round <= 5; round++)); do
    put resident "$round" lunar "$(awk '/^VmRSS/ { print int($2 / 1024 + 0.5) }' "/proc/$(server_pid lunar)/status"),,,,"
    local pid before
    pid=$(server_pid lunar)
    before=$(cpu_now "$pid")
    sleep 30
    put idle "$round" lunar "$((($(cpu_now "$pid") - before) / 30)),,,,"
  done
  progress resident
  progress idle
}
run_or_say() { "$@" > /tmp/lunar.log 2>&1 || { echo "bench: $1 $2: $(tail -n 3 /tmp/lunar.log)"; return 1; }; }
member_away() { # member_away TARGET DEVICE DISK
  case $1 in
    lunar) run_or_say lunar 1 disk fail "$3" --yes ;;
    md*) run_or_say mdadm "$2" --fail "$3" --remove "$3" && mdadm --zero-superblock "$3" ;;
  esac
}
member_new() { # member_new TARGET DEVICE DISK NEW: a rebuild begins
  case $1 in
    lunar) run_or_say lunar 1 disk replace "$3" "$4" --yes ;;
    md*) run_or_say mdadm "$2" --add "$4" ;;
  esac
}
is_rebuilding() { # is_rebuilding TARGET DEVICE
  case $1 in
    md*) ! grep -qx idle "/sys/block/${2##*/}/md/sync_action" ;;
    lunar) lunar 1 job list --json | grep -q '"state":"running"' ;;
  esac
}
measure_degraded() {
  local pair of
  for pair in "${targets[@]}"; do
    read -ra of <<< "${members_of[${pair%%=*}]}"
    member_away "${pair%%=*}" "${pair#*=}" "${of[1]}" || return 1
  done
  measure_fio "$1"
}
measure_rebuild() { # the rate of a rebuild with nothing beside, and the p99 during one and without
  local round pair name device of before workload healthy
  local -A old=() new=()
  healthy=$(printf '%s\n' "${targets[@]}" | sed -n 's/^lunar=//p')
  for pair in "${targets[@]}"; do
    take 1 || return 1
    read -ra of <<< "${members_of[${pair%%=*}]}"
    old[${pair%%=*}]=${of[1]} new[${pair%%=*}]=${taken[0]}
  done
  replace_one() { # replace_one NAME DEVICE
    if [ "$1" = lunar ]; then # what was failed is taken as a new disk
      lunar 1 disk remove --wipe --yes "${new[$1]}" > /tmp/lunar.log 2>&1
      run_or_say lunar 1 disk add "${new[$1]}" || return 1
    fi
    member_away "$1" "$2" "${old[$1]}" || return 1
    before=$(date +%s%N)
    member_new "$1" "$2" "${old[$1]}" "${new[$1]}" || return 1
    of=("${old[$1]}")
    old[$1]=${new[$1]} new[$1]=${of[0]}
  }
  for ((round = 1; round <= rounds; round++)); do
    for workload in read4k write4k; do
      put_round "$workload" "$round" "healthy=$healthy" || return 1
    done
    for pair in $(each "$round"); do
      name=${pair%%=*} device=${pair#*=}
      replace_one "$name" "$device" || return 1
      while is_rebuilding "$name" "$device"; do sleep 0.02; done
      put rebuild "$round" "$name" "$(((mib * 1000000000) / ($(date +%s%N) - before))),,,," || return 1
      for workload in read4k write4k; do
        replace_one "$name" "$device" || return 1
        put_round "$workload" "$round" "$name=$device" || return 1
        is_rebuilding "$name" "$device" || echo "# $workload, round $round: the rebuild of $name ended before the run" >> "$csv"
        while is_rebuilding "$name" "$device"; do sleep 0.1; done
      done
    done
  done
  progress rebuild
  progress read4k
  progress write4k
}
measure_recover() {
  local round slowest i
  for ((round = 1; round <= rounds; round++)); do
    slowest=$("$release/lunar-bench-report" recovery "$(of_lunar lunar)" /dev/lunar/1/many{1..16}) || { echo 'bench: a write failed'; return 1; }
    put recover16 "$round" lunar "$slowest,,,," || return 1
    # Two deaths in a minute would look like a crash that repeats itself: the next one is that of a new process.
    run_or_say lunar 1 shutdown --yes || return 1
    wait "${mgmtd_pid[1]}"
    lunar_up 1 "$release"
    for ((i = 0; i < 100; i++)); do
      lunar 1 status > /tmp/lunar.log 2>&1 && [ -b /dev/lunar/1/many16 ] && break
      sleep 0.1
    done
  done
  progress recover16
}

measure() { # measure SET: all rounds, to the CSV and to the screen
  local list=${workloads:-${workloads_of[$1]:-$raid_workloads}} code=0
  csv=$out/$1-$members.csv
  echo 'workload,round,target,iops,kib_s,p50_us,p99_us,cpu_us' > "$csv"
  fill || return 1
  if declare -F "measure_$1" > /dev/null; then "measure_$1" "$list" || code=1; else measure_fio "$list" || code=1; fi
  echo "# runs of $seconds s, $(nproc) CPUs, load of the machine before: ${BENCH_LOAD:-unknown}; commit ${BENCH_COMMIT:-unknown}" >> "$csv"
  awk '/^Vm(HWM|RSS|Lck)/ { printf "# ublk-target %s %d MiB\n", $1, $2 / 1024 }' "/proc/$(server_pid lunar)/status" 2>/dev/null >> "$csv"
  return "$code"
}

guest() {
  . "$root/fixtures/members.sh"
  local set code=0
  echo 2000000 > /proc/sys/dev/raid/speed_limit_max
  for set in "${sets[@]}"; do
    echo "== $set, members $members, $rounds rounds of $seconds s"
    lunar_start 1 "$release"
    [ -z "$beside" ] || lunar_start 2 "$beside"
    "set_$set"
    if [ ${#targets[@]} -gt 0 ]; then measure "$set" || code=1; fi
    tear_down
  done
  exit "$code"
}

report() { # puts the tables into the document, or prints them if they are of other CSVs than the committed ones
  local document=$root/tests/BENCHMARKS.md tables
  compgen -G "$out/*.csv" > /dev/null || { echo "bench: no CSV in $out"; return 1; }
  [ -e "$out/goals.txt" ] || cp "$root/tests/bench/goals.txt" "$out/" || return 1
  tables=$("$release/lunar-bench-report" report "$out") || return 1
  if [ "$out" != "$root/tests/bench" ] || ! grep -q '^<!-- tables -->' "$document" 2>/dev/null; then
    printf '%s\n' "$tables"
    return
  fi
  awk -v tables="$tables" '
    /^<!-- end of tables -->/ { skip = 0 }
    !skip { print }
    /^<!-- tables -->/ { print ""; print tables; print ""; skip = 1 }' "$document" > "$document.new" && mv "$document.new" "$document"
  echo "bench: tests/BENCHMARKS.md has the tables of $(ls "$out"/*.csv | wc -l) CSVs"
}

for set in "${sets[@]}"; do declare -F "set_$set" > /dev/null || bad_usage "unknown set $set"; done
for workload in ${workloads//,/ }; do workload_args "$workload" > /dev/null || exit 2; done
[ -n "$in_guest" ] && guest
[ -x "$release/lunar-bench-report" ] || { echo 'bench: not built. Try: cargo build --release --workspace'; exit 1; }
[ -n "$report" ] && { report; exit; }
if [ -n "$all" ]; then
  code=0
  again=("${BASH_SOURCE[0]}" --rounds "$rounds" --seconds "$seconds" --mib "$mib" --workloads "$workloads" --out "$out" --beside "$beside")
  "${again[@]}" --members ram "${sets[@]}" || code=1
  "${again[@]}" --members null_blk "${md_sets[@]}" || code=1
  report || code=1
  exit "$code"
fi

command -v fio > /dev/null || { echo 'bench: no fio. Try: fixtures/setup.sh'; exit 1; }
mkdir -p "$out"
rublk=${XDG_CACHE_HOME:-$HOME/.cache}/lunar/rublk/bin/rublk
limit=$((${#sets[@]} * 9 * rounds * 5 * (seconds + 2) + rounds * 90 + 300))
see=()
for program in "${KUBLK:-}" "${RUBLK:-$rublk}" "${beside:+$beside/mgmtd}"; do
  [ -x "$program" ] && see+=(--see "$(dirname "$program")")
done
exec "$root/fixtures/lab.sh" "${see[@]}" --mem 10G --ram-disks-kib $((mib * 1024)) --append brd.rd_nr=24 --timeout "$limit" --share "$out" \
  --env "KUBLK=${KUBLK:-}" --env "RUBLK=${RUBLK:-$rublk}" --env "CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-}" \
  --env "BENCH_LOAD=$(cut -d' ' -f1 /proc/loadavg)" --env "BENCH_COMMIT=$(git -C "$root" describe --always --dirty)" -- \
  "$root/tests/bench.sh" --guest --rounds "$rounds" --seconds "$seconds" --members "$members" --mib "$mib" --workloads "$workloads" \
  --out "$out" --beside "$beside" "${sets[@]}"
