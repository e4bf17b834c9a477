# shellcheck shell=bash
# What tests/bench.sh measures: Lunar and its peers. Sourced by it, inside the lab.
# make_NAME DISKS.. prints the device and returns 77 (with a reason on stderr) if it cannot be had here.

# Lunar as its users have it: mgmtd, ublk-target, one group, one LU of all its space. System 1 is this tree's
# build, system 2 that of --beside.
declare -A lunar_dir=() mgmtd_pid=()
lunar() { "${lunar_dir[$1]}/lunar" --system "$1" "${@:2}"; } # lunar SYSTEM ARG..
lunar_start() { # lunar_start SYSTEM DIR: a new system
  lunar_dir[$1]=$2
  [ -x "$2/mgmtd" ] || return
  rm -rf "/tmp/lunar-bench/$1"
  mkdir -p "/tmp/lunar-bench/$1"
  lunar_up "$@"
}
lunar_up() { # lunar_up SYSTEM DIR: the system that its state directory has
  local i state=/tmp/lunar-bench/$1
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
# lunar_make SYSTEM LEVEL[:POLICY] DISKS..: prints the device. The members are zero, so their parity is right. POLICY: none,
# what md does too unless told otherwise
lunar_make() {
  local system=$1 level=${2%:*} policy=${2#*:} clean=() chunk=(--chunk 64KiB) name
  [ "$policy" != "$level" ] || policy=none
  name=bench-$level-$policy
  shift 2
  [ -n "${mgmtd_pid[$system]:-}" ] || { echo 'lunar: not built. Try: cargo build --release' >&2; return 77; }
  case $level in
    linear) chunk=() ;;
    raid0) ;;
    *) clean=(--assume-clean --consistency "$policy") ;;
  esac
  {
    lunar "$system" disk add "$@" \
      && lunar "$system" group create "$name" --level "$level" --disks "$@" "${chunk[@]}" "${clean[@]}" \
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

make_md() { # make_md LEVEL POLICY THREADS DISKS..: POLICY resync | bitmap | ppl | -
  local level=$1 policy=$2 threads=$3 number=10 device extra=()
  shift 3
  while [ -e "/sys/block/md$number" ]; do number=$((number + 1)); done
  device=/dev/md$number
  [ "$policy" = - ] || extra+=("--consistency-policy=$policy")
  [ "$policy" = bitmap ] && extra+=(--bitmap=internal)
  [ "$level" = 0 ] || extra+=(--assume-clean)
  [ "$level" = 10 ] && extra+=(--layout=n2)
  mdadm --create "$device" --run --level="$level" --chunk=64 --metadata=1.2 --raid-devices=$# "${extra[@]}" "$@" > /tmp/mdadm.log 2>&1 \
    || { echo "md raid$level $policy: $(tail -n 1 /tmp/mdadm.log)" >&2; return 77; }
  case $level in
    5 | 6)
      echo 4096 > "/sys/block/md$number/md/stripe_cache_size"
      echo "$threads" > "/sys/block/md$number/md/group_thread_cnt"
      ;;
  esac
  printf '%s\n' "$device"
}
add_md() { # add_md LEVEL COUNT: with md's own thread alone and with two more, each with a large stripe cache
  add md-t0 "$2" make_md "$1" resync 0
  add md-t2 "$2" make_md "$1" resync 2
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

of_lunar() { # the oldest ublk-target of a system: the others are its helpers
  local system=1
  [ "$1" != lunar-beside ] || system=2
  cat "/run/lunar/$system/target.pid" 2>/dev/null || pgrep -o -x ublk-target
}
server_pid() { # server_pid TARGET: the process behind it
  case $1 in
    lunar | healthy | lunar-beside) of_lunar "$1" ;;
    kublk-*) pgrep -n -x kublk ;;
    rublk-*) pgrep -n -x rublk ;;
  esac
}
# In parentheses: fio puts a redirection behind it.
cpu_command() { echo "(cat /proc/$1/task/*/schedstat 2>/dev/null || cat /proc/$1/stat)"; } # cpu_command PID: prints it for cpu_us
cpu_us() { # cpu_us [FILE]: time on a CPU, all threads; 0 if there is no process
  cat "$@" 2> /dev/null | awk 'NF == 3 { us += $1 / 1000 } NF > 3 { us = ($14 + $15) * 10000 } END { printf "%d\n", us }'
}
cpu_now() { sh -c "$(cpu_command "$1")" | cpu_us; } # cpu_now PID
