#!/usr/bin/env bash
# Builds Lunar with a bug in it, and proves that the power cuts find it. One line a mutant, `test mutants_NAME_is_found
# ... ok|FAILED`; exit 1 if one was not found.
#   tests/mutants.sh [NAME..]   without: all patches of tests/mutants
# NAME is that of a bug that `lunar-cuts --plant` knows: what is written, and lost, is such that it can show.
# Built in target/mutants, from the files of the checkout as they are.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
place=$target/mutants
names=("$@")
if [ ${#names[@]} -eq 0 ]; then
  for patch in tests/mutants/*.patch; do
    name=${patch##*/}
    names+=("${name%.patch}")
  done
fi

build() { # build NAME: the checkout, with the patch, in $place/bin
  rm -rf "$place/source"
  mkdir -p "$place/source" "$place/bin"
  git ls-files -z | xargs -0 cp --parents -pt "$place/source" || return 1
  # Not of the repository around it.
  (cd "$place/source" && GIT_CEILING_DIRECTORIES=$place git apply "$root/tests/mutants/$1.patch") || return 1
  (cd "$place/source" && CARGO_TARGET_DIR=$place/target cargo build --locked --release -p ublk-target) || return 1
  cp "$place/target/release/ublk-target" "$place/bin" || return 1
  cp "$target/release/"{lunar,mgmtd,lunar-cuts,liblunar_disk_shim.so} "$place/bin"
}

cargo build --locked --release --workspace || exit 1
# What is compiled already serves here, too: only what the patch touches is compiled anew.
rm -rf "$place/target"
mkdir -p "$place/target/release"
cp -a --reflink=auto "$target/release/"{deps,build,.fingerprint} "$place/target/release" || exit 1
code=0
for name in "${names[@]}"; do
  log=$place/$name.log
  mkdir -p "$place"
  if build "$name" > "$log" 2>&1 \
    && "$place/bin/lunar-cuts" --plant "$name" --built-in --cuts "${LUNAR_MUTANT_CUTS:-60}" --seed "${LUNAR_CUTS_SEED:-1}" >> "$log" 2>&1; then
    grep '^caught' "$log"
    echo "test mutants_${name}_is_found ... ok"
  else
    tail -n 20 "$log"
    echo "test mutants_${name}_is_found ... FAILED"
    code=1
  fi
done
exit "$code"
