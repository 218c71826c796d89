#!/usr/bin/env bash
# Unpacks Debian's or Ubuntu's Python for 64-bit Arm into a folder, beside the system and without changing it.
# Usage: tests/aarch64/sysroot.sh FOLDER
set -euo pipefail
mkdir -p "$1"
folder=$(realpath "$1")
packages=(python3 libpython3-dev libstdc++6 libgomp1)
mkdir -p "$folder"/apt/{lists,archives}/partial
touch "$folder/apt/status"
get() {
  apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Sandbox::User= \
    -o Dir::State::lists="$folder/apt/lists" -o Dir::State::status="$folder/apt/status" \
    -o Dir::Cache::archives="$folder/apt/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= "$@"
}
get update
get install --yes --download-only --no-install-recommends "${packages[@]}"
for package in "$folder"/apt/archives/*.deb; do dpkg-deb --extract "$package" "$folder"; done
rm -r "$folder/apt"
