#!/usr/bin/env bash
# Runs the simulator (tests/src/sim): the real engine on simulated disks, one seed one run.
#
#   tests/sim.sh                              the default seeds, 1 to 500
#   tests/sim.sh --seconds 3600 --from 1000   seeds from 1000 on, for an hour
#   tests/sim.sh --run '17 without 3,4'       one run, told step by step on standard error
#   tests/sim.sh --all                        what tests/run.sh runs: also kept runs, planted bugs, the write hole
#   tests/sim.sh --keep ..                    failing runs are shrunk and added to fixtures/seeds/kept.txt
#
# More options: tests/sim.sh --help
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if ! command -v cargo > /dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then
  PATH=$PATH:$HOME/.cargo/bin
fi
cargo build --locked --profile sim -p lunar-tests --bin lunar-sim --features planted || exit 1
exec "${CARGO_TARGET_DIR:-target}/sim/lunar-sim" "$@"
