#!/usr/bin/env bash
# Measures Lunar beside md, kublk and rublk in one boot of the lab, as ratios of interleaved runs.
#
#   tests/bench.sh [OPTIONS] [SET..]
#   --rounds N        rounds of every workload on every target, default 5
#   --seconds N       length of one run, default 3
#   --members KIND    ram (default) or null_blk (200 us latency, volatile cache)
#   --mib N           size of one member, default 192
#   --workloads LIST  comma-separated, default all: read4k write4k read1m write1m qd1read qd1write qd1sync
#   --out DIR         where the CSVs go, default tests/bench
#   --beside DIR      another build of Lunar (its target/release) as one more target, for before and after
#   --all             every set on ram members, then on null_blk members, then the report
#   --report          measures nothing: writes the tables of tests/BENCHMARKS.md anew from the CSVs
#   SET..             raid0 raid5 linear null loop; default all
#
# Only ratios mean anything: absolute numbers swing by a factor of two on shared cores. Each round runs the
# workload once on every target, the order turned by one, and ratios are taken within a round. Every round is a
# row of tests/bench/SET-MEMBERS.csv; cpu_us is user and system time of the target's server for one I/O.
# A peer that is not there is left out and named:
#   KUBLK=FILE        the kernel's own ublk server; rublk: see fixtures/peers.sh
set -u -o pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$root/tests/bench
release=$(realpath -m "${CARGO_TARGET_DIR:-$root/target}/release")

usage() { sed -n '2,/^set -u/s/^# \{0,1\}//p' "$0"; }
bad_usage() { echo "bench: $*"; echo 'Try: tests/bench.sh --help'; exit 2; }
all_sets=(raid0 raid5 linear null loop)
in_guest='' all='' beside='' report='' rounds=5 seconds=3 members=ram mib=192 sets=()
workloads=read4k,write4k,read1m,write1m,qd1read,qd1write,qd1sync
while [ $# -gt 0 ]; do
  case $1 in
    --guest) in_guest=1 ;;
    --rounds) rounds=${2:?}; shift ;;
    --seconds) seconds=${2:?}; shift ;;
    --members) members=${2:?}; shift ;;
    --mib) mib=${2:?}; shift ;;
    --workloads) workloads=${2:?}; shift ;;
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

# ---------------------------------------------------------------------------------------------------
# Targets. make_NAME DISKS.. prints the device and returns 77 (with a reason on stderr) if it cannot be had here.

# Lunar as its users have it: mgmtd, ublk-target, one group, one LU of all its space. System 1 is this tree's
# build, system 2 that of --beside.
declare -A lunar_dir=() mgmtd_pid=()
lunar() { "${lunar_dir[$1]}/lunar" --system "$1" "${@:2}"; } # lunar SYSTEM ARG..
lunar_start() { # lunar_start SYSTEM DIR
  local i state=/tmp/lunar-bench/$1
  lunar_dir[$1]=$2
  [ -x "$2/mgmtd" ] || return
  rm -rf "$state"
  mkdir -p "$state"
  PATH=$2:$PATH "$2/mgmtd" --system "$1" --state-dir "$state" > "/tmp/mgmtd$1.log" 2>&1 &
  mgmtd_pid[$1]=$!
  for ((i = 0; i < 300; i++)); do
    lunar "$1" status > /dev/null 2>&1
    [ $? != 5 ] && return
    sleep 0.1
  done
  echo "bench: mgmtd does not answer: $(tail -n 1 "/tmp/mgmtd$1.log")"
}
lunar_idle() { # waits until no job runs: a sync would be measured too
  local i
  for ((i = 0; i < 1200; i++)); do
    lunar "$1" job list --json 2>/dev/null | grep -q '"state":"running"' || return 0
    sleep 0.1
  done
  echo 'lunar: jobs do not end' >&2
  return 1
}
lunar_make() { # lunar_make SYSTEM LEVEL DISKS..: prints the device; the members are zero, so their parity is right
  local system=$1 level=$2 name=bench-$2 clean=()
  shift 2
  [ -n "${mgmtd_pid[$system]:-}" ] || { echo 'lunar: not built. Try: cargo build --release' >&2; return 77; }
  [ "$level" = linear ] && level=raid0 # of one member: the same layout
  [ "$level" = raid0 ] || clean=(--assume-clean)
  {
    lunar "$system" disk add "$@" \
      && lunar "$system" group create "$name" --level "$level" --disks "$@" --chunk 64KiB "${clean[@]}" \
      && lunar "$system" lu create "$name" --group "$name" --size max && lunar_idle "$system"
  } > /tmp/lunar.log 2>&1 || { echo "lunar $level: $(tail -n 1 /tmp/lunar.log)" >&2; return 77; }
  readlink -f "/dev/lunar/$system/$name"
}
lunar_remove() {
  local system
  for system in "${!mgmtd_pid[@]}"; do
    lunar "$system" shutdown --yes > /tmp/lunar.log 2>&1 || { cat /tmp/lunar.log; kill "${mgmtd_pid[$system]}"; }
    wait "${mgmtd_pid[$system]}"
  done
  mgmtd_pid=()
}
add_lunar() { # add_lunar LEVEL COUNT
  add lunar "$2" lunar_make 1 "$1"
  [ -z "$beside" ] || add lunar-beside "$2" lunar_make 2 "$1"
}

make_raw() { printf '%s\n' "$1"; }

make_md() { # make_md LEVEL POLICY DISKS..: POLICY resync | bitmap | ppl | -
  local level=$1 policy=$2 number=10 device extra=()
  shift 2
  while [ -e "/sys/block/md$number" ]; do number=$((number + 1)); done
  device=/dev/md$number
  [ "$policy" = - ] || extra+=("--consistency-policy=$policy")
  [ "$policy" = bitmap ] && extra+=(--bitmap=internal)
  [ "$level" = 5 ] && extra+=(--assume-clean)
  mdadm --create "$device" --run --level="$level" --chunk=64 --metadata=1.2 --raid-devices=$# "${extra[@]}" "$@" > /tmp/mdadm.log 2>&1 \
    || { echo "md raid$level $policy: $(tail -n 1 /tmp/mdadm.log)" >&2; return 77; }
  printf '%s\n' "$device"
}

new_ublk() { # new_ublk COMMAND..: runs it and prints the /dev/ublkbN that came with it
  local before after
  before=$(ls /dev/ublkb* 2>/dev/null)
  "$@" > /tmp/server.log 2>&1 || { echo "$1: $(tail -n 1 /tmp/server.log)" >&2; return 77; }
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    after=$(comm -13 <(printf '%s\n' "$before") <(ls /dev/ublkb* 2>/dev/null) | head -n 1)
    [ -n "$after" ] && { printf '%s\n' "$after"; return; }
    sleep 0.1
  done
  echo "$1: no device came" >&2
  return 77
}
make_kublk() { # make_kublk TYPE DISKS..
  local type=$1 extra=()
  shift
  [ -x "${KUBLK:-}" ] || { echo 'kublk: KUBLK is not set' >&2; return 77; }
  [ "$type" = stripe ] && extra=(--chunk_size 65536)
  new_ublk "$KUBLK" add -t "$type" -q 1 -d 128 --auto_zc "${extra[@]}" "$@"
}
make_rublk() { # make_rublk DISK
  [ -x "${RUBLK:-}" ] || { echo 'rublk: not there, see fixtures/peers.sh' >&2; return 77; }
  new_ublk "$RUBLK" add loop -z -q 1 -d 128 -f "$1"
}

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
add() { # add NAME COUNT COMMAND..: makes a target on COUNT members; leaves it out if it cannot be had
  local name=$1 count=$2 device code
  shift 2
  take "$count" || { echo "bench: no members left for $name"; exit 1; }
  device=$("$@" "${taken[@]}" 2> /tmp/reason)
  code=$?
  if [ "$code" = 0 ] && [ -b "$device" ]; then
    targets+=("$name=$device")
  else
    echo "bench: left out: $(tail -n 1 /tmp/reason)"
    spare+=("${taken[@]}")
  fi
}

set_raid0() {
  add_lunar raid0 4
  add md 4 make_md 0 -
  add kublk-stripe 4 make_kublk stripe
}
set_raid5() { # md-bitmap and md-ppl are for information: Lunar's policy here is none, md's is resync
  add_lunar raid5 4
  add md-resync 4 make_md 5 resync
  add md-bitmap 4 make_md 5 bitmap
  add md-ppl 4 make_md 5 ppl
  add kublk-loop 1 make_kublk loop
}
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
  spare=()
  next_member=0
}

# ---------------------------------------------------------------------------------------------------
# Measuring.

workload_args() { # workload_args NAME: the fio options
  case $1 in
    read4k) echo '--rw=randread --bs=4k --iodepth=32' ;;
    write4k) echo '--rw=randwrite --bs=4k --iodepth=32' ;;
    read1m) echo '--rw=read --bs=1M --iodepth=8' ;;
    write1m) echo '--rw=write --bs=1M --iodepth=8' ;;
    qd1read) echo '--rw=randread --bs=4k --iodepth=1' ;;
    qd1write) echo '--rw=randwrite --bs=4k --iodepth=1' ;;
    qd1sync) echo '--rw=randwrite --bs=4k --iodepth=1 --fdatasync=1' ;;
    *) bad_usage "unknown workload $1" ;;
  esac
}

run_fio() { # run_fio WORKLOAD DEVICE [ARG..]: prints iops,kib_s,p50_us,p99_us
  local args device=$2
  read -ra args <<< "$(workload_args "$1")"
  shift 2
  # Terse version 3: read fields from 6 (KiB/s 7, IOPS 8, percentiles 18-37), write the same 41 fields later.
  fio --name=bench --filename="$device" --direct=1 --ioengine=io_uring --time_based --runtime="$seconds" --ramp_time=0.3 \
    --norandommap --randrepeat=0 --numjobs=1 --output-format=terse --terse-version=3 "${args[@]}" "$@" 2> /tmp/fio.err \
    | awk -F';' '$1 == 3 {
        base = $8 > 0 ? 0 : 41
        for (i = 18 + base; i <= 37 + base; i++) { split($i, pair, "%="); of[pair[1] + 0] = pair[2] }
        print $(8 + base) "," $(7 + base) "," of[50] "," of[99]
      }'
}

of_lunar() { # the oldest ublk-target of a system: the others are its helpers
  local system=1
  [ "$1" = lunar ] || system=2
  cat "/run/lunar/$system/target.pid" 2>/dev/null || pgrep -o -x ublk-target
}
server_pid() { # server_pid TARGET: the process behind it
  case $1 in
    lunar | lunar-beside) of_lunar "$1" ;;
    kublk-*) pgrep -n -x kublk ;;
    rublk-*) pgrep -n -x rublk ;;
  esac
}
cpu_ms() { # cpu_ms PID: user and system time up to now
  [ -n "$1" ] && awk '{ print ($14 + $15) * 10 }' "/proc/$1/stat" || echo 0
}

run_one() { # run_one WORKLOAD TARGET DEVICE: prints iops,kib_s,p50_us,p99_us,cpu_us
  local pid before row
  case $2 in
    bench-loop)
      "$release/ublk-target" bench-loop --depth 32 --seconds "$seconds" ${3//:/ } 2> /tmp/fio.err | awk '{ printf "%d,%d,,,\n", $1, $1 * 4 }'
      return
      ;;
    fio) # as the loop does it: registered files and buffers, completions in batches
      row=$(run_fio "$1" "$3" --iodepth=128 --iodepth_batch_complete_min=1 --iodepth_batch_complete_max=128 --fixedbufs=1 --registerfiles=1)
      [ -n "$row" ] && echo "$row,"
      return
      ;;
  esac
  pid=$(server_pid "$2")
  before=$(cpu_ms "$pid")
  row=$(run_fio "$1" "$3")
  [ -n "$row" ] || return 1
  # fio's 0.3 s of ramp are in the time too.
  awk -v ms="$(($(cpu_ms "$pid") - before))" -v seconds="$seconds" -v row="$row" -v pid="$pid" 'BEGIN {
    split(row, of, ",")
    if (pid == "" || of[1] < 1) print row ","; else printf "%s,%.1f\n", row, ms * 1000 / (of[1] * (seconds + 0.3))
  }'
}

measure() { # measure SET NAME=DEVICE..: all rounds of all workloads, to the CSV and to the screen
  local set=$1 workload round i pair row count csv=$out/$1-$members.csv list=$workloads
  shift
  count=$#
  [ "$set" = loop ] && list=read4k
  echo 'workload,round,target,iops,kib_s,p50_us,p99_us,cpu_us' > "$csv"
  for pair in "$@"; do # first touch, so that no target pays for memory that others have
    for device in $(tr : ' ' <<< "${pair#*=}"); do
      dd if=/dev/zero of="$device" bs=1M count=$((4 * mib)) oflag=direct status=none 2>/dev/null
    done
  done
  for workload in ${list//,/ }; do
    for ((round = 1; round <= rounds; round++)); do
      for ((i = 0; i < count; i++)); do
        pair=${@:$(((i + round) % count + 1)):1}
        row=$(run_one "$workload" "${pair%%=*}" "${pair#*=}")
        [ -n "$row" ] || { echo "bench: no result of ${pair%%=*}: $(tail -n 1 /tmp/fio.err)"; return 1; }
        echo "$workload,$round,${pair%%=*},$row" >> "$csv"
      done
    done
    table "$csv" "$workload" "${1%%=*}"
  done
  echo "# runs of $seconds s, load of the machine before: ${BENCH_LOAD:-unknown}" >> "$csv"
  awk '/^Vm(HWM|RSS|Lck)/ { printf "# ublk-target %s %d MiB\n", $1, $2 / 1024 }' "/proc/$(server_pid lunar)/status" 2>/dev/null | tee -a "$csv"
}

table() { # table CSV WORKLOAD BASE: medians, and BASE's ratio to each target within the rounds
  awk -F, -v workload="$2" -v base="$3" '
    function quantile(values, n, q,    i, j, t) {
      for (i = 2; i <= n; i++) for (j = i; j > 1 && values[j - 1] > values[j]; j--) { t = values[j]; values[j] = values[j - 1]; values[j - 1] = t }
      return values[int((n - 1) * q + (q < 0.5 ? 0 : 0.5)) + 1]
    }
    $1 == workload { if (!($3 in known)) { known[$3] = 1; name[++names] = $3 } iops[$3, $2] = $4; kib[$3, $2] = $5; p99[$3, $2] = $7; if ($2 > rounds) rounds = $2 }
    END {
      printf "%-9s %-13s %10s %9s %9s   ratio of %s to it: median (lower quartile)\n", workload, "target", "IOPS", "MB/s", "p99 us", base
      for (t = 1; t <= names; t++) {
        n = 0
        for (r = 1; r <= rounds; r++) { n++; a[n] = iops[name[t], r]; b[n] = kib[name[t], r]; c[n] = p99[name[t], r]; d[n] = e[n] = a[n] > 0 ? iops[base, r] / a[n] : 0 }
        printf "%-9s %-13s %10d %9.1f %9d", "", name[t], quantile(a, n, 0.5), quantile(b, n, 0.5) * 1.024 / 1000, quantile(c, n, 0.5)
        if (name[t] == base) print ""; else printf "   %.2f (%.2f)\n", quantile(d, n, 0.5), quantile(e, n, 0.25)
      }
    }' "$1"
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
    if [ ${#targets[@]} -gt 0 ]; then measure "$set" "${targets[@]}" || code=1; fi
    tear_down
  done
  exit "$code"
}

# ---------------------------------------------------------------------------------------------------
# The report: everything in the CSVs as the tables of tests/BENCHMARKS.md, between its two marks.

report_tables() {
  awk -F, '
    function quantile(values, n, q,    i, j, t) {
      for (i = 2; i <= n; i++) for (j = i; j > 1 && values[j - 1] > values[j]; j--) { t = values[j]; values[j] = values[j - 1]; values[j - 1] = t }
      return values[int((n - 1) * q + (q < 0.5 ? 0 : 0.5)) + 1]
    }
    # At least this ratio to the peer is wanted; 0: for information.
    function goal(set, members, workload, peer) {
      if (set == "loop" || peer == "raw" || peer == "md-bitmap" || peer == "md-ppl" || peer == "rublk-loop") return 0
      if (members == "null_blk" && peer ~ /^md/) return 1
      if (set == "raid0") {
        if (workload ~ /^qd1/) return peer == "md" ? 0 : 0.9
        if (peer == "md") return workload ~ /1m$/ ? 0.8 : 1.3
        return 0.95
      }
      if (set == "linear") return workload ~ /^qd1/ ? 0.9 : 0.95
      if (set == "raid5" && peer == "kublk-loop") return workload ~ /^read/ ? 0.9 : 0
      if (set == "raid5" && workload == "write4k") return 0.9
      if (set == "raid5" && workload == "write1m") return 0.7
      return 0
    }
    FNR == 1 { name = FILENAME; sub(/.*\//, "", name); sub(/\.csv$/, "", name); next }
    /^#/ { note[++notes] = name ": " substr($0, 3); next }
    {
      key = name "," $1
      if (!(key in known)) { known[key] = 1; rows[++count] = key }
      if (index(targets[name] ",", "," $3 ",") == 0) targets[name] = targets[name] "," $3
      iops[key, $3, $2] = $4; kib[key, $3, $2] = $5; p99[key, $3, $2] = $7; cpu[key, $3, $2] = $8
      if ($2 > rounds[key]) rounds[key] = $2
    }
    END {
      for (k = 1; k <= count; k++) {
        split(rows[k], part, ","); name = part[1]; workload = part[2]
        split(name, half, "-"); n = split(substr(targets[name], 2), target, ",")
        base = half[1] == "loop" ? "bench-loop" : "lunar"
        for (t = 1; t <= n; t++) {
          if (target[t] == base) continue
          r = 0
          for (i = 1; i <= rounds[rows[k]]; i++) {
            a = iops[rows[k], base, i]; b = iops[rows[k], target[t], i]
            if (!(a > 0 && b > 0)) continue
            r++; ratio[r] = a / b; mine[r] = a; theirs[r] = b
            slow[r] = p99[rows[k], target[t], i] > 0 ? p99[rows[k], base, i] / p99[rows[k], target[t], i] : 0
            work[r] = cpu[rows[k], target[t], i] > 0 ? cpu[rows[k], base, i] / cpu[rows[k], target[t], i] : 0
          }
          if (r == 0) continue
          want = goal(half[1], half[2], workload, target[t])
          median = quantile(ratio, r, 0.5); lower = quantile(ratio, r, 0.25)
          slower = quantile(slow, r, 0.5); more = quantile(work, r, 0.5)
          printf "%d\t%.4f\t| %s | %s | %s | %s | %d | %d | **%.2f** | %.2f | %s | %s | %s |\n", \
            (want > 0 ? 0 : 1), (want > 0 ? lower / want : lower), half[1], half[2], workload, target[t], \
            quantile(mine, r, 0.5), quantile(theirs, r, 0.5), median, lower, \
            (want > 0 ? sprintf("%.2f %s", want, lower >= want ? "yes" : "no") : ""), \
            (slower > 0 ? sprintf("%.2f", slower) : ""), (more > 0 ? sprintf("%.2f", more) : "")
        }
      }
      for (i = 1; i <= notes; i++) printf "2\t%d\t- %s\n", i, note[i]
    }' "$out"/*.csv | sort -t$'\t' -k1,1n -k2,2n | awk -F'\t' '
    function head() {
      print "| set | members | workload | peer | Lunar IOPS | peer IOPS | ratio | lower quartile | goal | p99 ratio | server CPU ratio |"
      print "|---|---|---|---|---|---|---|---|---|---|---|"
    }
    $1 == 0 && !seen[0]++ { print "### Rows with a goal, the worst first\n"; head() }
    $1 == 1 && !seen[1]++ { print "\n### For information\n"; head() }
    $1 == 2 && !seen[2]++ { print "\n### Notes: how it was run, memory of ublk-target at the end\n" }
    { print $3 }'
}

report() { # puts the tables into the document, or prints them if there is none
  local document=$root/tests/BENCHMARKS.md tables
  compgen -G "$out/*.csv" > /dev/null || { echo "bench: no CSV in $out"; return 1; }
  tables=$(report_tables)
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
[ -n "$report" ] && { report; exit; }
if [ -n "$all" ]; then
  code=0
  for kind in ram null_blk; do
    "${BASH_SOURCE[0]}" --rounds "$rounds" --seconds "$seconds" --members "$kind" --mib "$mib" --workloads "$workloads" --out "$out" --beside "$beside" "${sets[@]}" || code=1
  done
  report || code=1
  exit "$code"
fi

command -v fio > /dev/null || { echo 'bench: no fio. Try: fixtures/setup.sh'; exit 1; }
mkdir -p "$out"
rublk=${XDG_CACHE_HOME:-$HOME/.cache}/lunar/rublk/bin/rublk
limit=$((${#sets[@]} * 7 * rounds * 5 * (seconds + 2) + 120))
see=()
for program in "${KUBLK:-}" "${RUBLK:-$rublk}" "${beside:+$beside/mgmtd}"; do
  [ -x "$program" ] && see+=(--see "$(dirname "$program")")
done
exec "$root/fixtures/lab.sh" "${see[@]}" --mem 6G --ram-disks-kib $((mib * 1024)) --append brd.rd_nr=24 --timeout "$limit" --share "$out" \
  --env "KUBLK=${KUBLK:-}" --env "RUBLK=${RUBLK:-$rublk}" --env "CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-}" \
  --env "BENCH_LOAD=$(cut -d' ' -f1 /proc/loadavg)" -- \
  "$root/tests/bench.sh" --guest --rounds "$rounds" --seconds "$seconds" --members "$members" --mib "$mib" --workloads "$workloads" \
  --out "$out" --beside "$beside" "${sets[@]}"
