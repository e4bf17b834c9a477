#!/usr/bin/env bash
# Measures Lunar beside md, kublk and rublk in one boot of the lab, as ratios of interleaved runs.
#
#   tests/bench.sh [OPTIONS] [SET..]
#   --rounds N        rounds of every workload on every target, default 5
#   --seconds N       length of one run, default 3
#   --members KIND    ram (default) or null_blk (200 us latency, volatile cache)
#   --mib N           size of one member, default 192
#   --workloads LIST  comma-separated, default all: read4k write4k read1m write1m qd1read qd1write qd1sync
#   SET..             raid0 raid5 linear null; default all
#
# Only ratios mean anything: absolute numbers swing by a factor of two on shared cores. Each round runs the
# workload once on every target, the order turned by one, and ratios are taken within a round. Every round is a
# row of tests/bench/SET-MEMBERS.csv. A peer that is not there is left out and named:
#   KUBLK=FILE        the kernel's own ublk server; rublk: see fixtures/peers.sh
set -u -o pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$root/tests/bench

usage() { sed -n '2,/^set -u/s/^# \{0,1\}//p' "$0"; }
bad_usage() { echo "bench: $*"; echo 'Try: tests/bench.sh --help'; exit 2; }
all_sets=(raid0 raid5 linear null)
in_guest='' rounds=5 seconds=3 members=ram mib=192 sets=()
workloads=read4k,write4k,read1m,write1m,qd1read,qd1write,qd1sync
while [ $# -gt 0 ]; do
  case $1 in
    --guest) in_guest=1 ;;
    --rounds) rounds=${2:?}; shift ;;
    --seconds) seconds=${2:?}; shift ;;
    --members) members=${2:?}; shift ;;
    --mib) mib=${2:?}; shift ;;
    --workloads) workloads=${2:?}; shift ;;
    -h | --help) usage; exit 0 ;;
    -*) bad_usage "unknown option $1" ;;
    *) sets+=("$1") ;;
  esac
  shift
done
[ ${#sets[@]} -gt 0 ] || sets=("${all_sets[@]}")

# ---------------------------------------------------------------------------------------------------
# Targets. make_NAME DISKS.. prints the device and returns 77 (with a reason on stderr) if it cannot be had here.

# Lunar: one group of LEVEL on DISKS with one LU of all its space; prints /dev/ublkbN. To be filled in.
lunar_make() { # lunar_make LEVEL DISKS..
  echo 'lunar: not wired into this benchmark yet' >&2
  return 77
}
lunar_remove() { :; }

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
  add lunar 4 lunar_make raid0
  add md 4 make_md 0 -
  add kublk-stripe 4 make_kublk stripe
}
set_raid5() {
  add lunar 4 lunar_make raid5
  add md-resync 4 make_md 5 resync
  add md-bitmap 4 make_md 5 bitmap
  add md-ppl 4 make_md 5 ppl
}
set_linear() {
  add lunar 1 lunar_make linear
  add raw 1 make_raw
  add kublk-loop 1 make_kublk loop
  add rublk-loop 1 make_rublk
}
set_null() { add kublk-null 0 make_kublk null; }

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

run_fio() { # run_fio WORKLOAD DEVICE: prints iops,kib_s,p50_us,p99_us
  local args
  read -ra args <<< "$(workload_args "$1")"
  # Terse version 3: read fields from 6 (KiB/s 7, IOPS 8, percentiles 18-37), write the same 41 fields later.
  fio --name=bench --filename="$2" --direct=1 --ioengine=io_uring --time_based --runtime="$seconds" --ramp_time=0.3 \
    --norandommap --randrepeat=0 --numjobs=1 --output-format=terse --terse-version=3 "${args[@]}" 2> /tmp/fio.err \
    | awk -F';' '$1 == 3 {
        base = $8 > 0 ? 0 : 41
        for (i = 18 + base; i <= 37 + base; i++) { split($i, pair, "%="); of[pair[1] + 0] = pair[2] }
        print $(8 + base) "," $(7 + base) "," of[50] "," of[99]
      }'
}

measure() { # measure SET NAME=DEVICE..: all rounds of all workloads, to the CSV and to the screen
  local set=$1 workload round i pair row count csv=$out/$1-$members.csv
  shift
  count=$#
  echo 'workload,round,target,iops,kib_s,p50_us,p99_us' > "$csv"
  for pair in "$@"; do # first touch, so that no target pays for memory that others have
    dd if=/dev/zero of="${pair#*=}" bs=1M count=$((4 * mib)) oflag=direct status=none 2>/dev/null
  done
  for workload in ${workloads//,/ }; do
    for ((round = 1; round <= rounds; round++)); do
      for ((i = 0; i < count; i++)); do
        pair=${@:$(((i + round) % count + 1)):1}
        row=$(run_fio "$workload" "${pair#*=}")
        [ -n "$row" ] || { echo "bench: fio failed on ${pair%%=*}: $(tail -n 1 /tmp/fio.err)"; return 1; }
        echo "$workload,$round,${pair%%=*},$row" >> "$csv"
      done
    done
    table "$csv" "$workload" "${1%%=*}"
  done
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
    "set_$set"
    if [ ${#targets[@]} -gt 0 ]; then measure "$set" "${targets[@]}" || code=1; fi
    tear_down
  done
  exit "$code"
}

for set in "${sets[@]}"; do declare -F "set_$set" > /dev/null || bad_usage "unknown set $set"; done
for workload in ${workloads//,/ }; do workload_args "$workload" > /dev/null || exit 2; done
[ -n "$in_guest" ] && guest

command -v fio > /dev/null || { echo 'bench: no fio. Try: fixtures/setup.sh'; exit 1; }
mkdir -p "$out"
rublk=${XDG_CACHE_HOME:-$HOME/.cache}/lunar/rublk/bin/rublk
limit=$((${#sets[@]} * 7 * rounds * 4 * (seconds + 2) + 120))
see=()
for program in "${KUBLK:-}" "${RUBLK:-$rublk}"; do
  [ -x "$program" ] && see+=(--see "$(dirname "$program")")
done
exec "$root/fixtures/lab.sh" "${see[@]}" --mem 6G --ram-disks-kib $((mib * 1024)) --timeout "$limit" --share "$out" \
  --env "KUBLK=${KUBLK:-}" --env "RUBLK=${RUBLK:-$rublk}" -- \
  "$root/tests/bench.sh" --guest --rounds "$rounds" --seconds "$seconds" --members "$members" --mib "$mib" --workloads "$workloads" "${sets[@]}"
