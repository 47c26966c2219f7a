#!/bin/sh
# Stops a service of nixlet's and ends its pods, which a mere stop leaves running. Images and data stay; systemctl start brings the
# node back.
set -eu

: "${name:=nixlet}" "${bin:=/usr/local/bin}" "${units:=/etc/systemd/system}"
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:$PATH:/nix/var/nix/profiles/default/bin
export PATH

[ "$(id -u)" = 0 ] || { echo "error: only root can end pods; run this as root, for example with sudo" >&2; exit 125; }
if [ -d /run/systemd/system ] && command -v systemctl >/dev/null; then systemctl stop "$name" 2>/dev/null || true; fi
exec "$bin/nixlet" uninstall --unit "$units/$name.service" --pods-only --ignore-missing --yes
