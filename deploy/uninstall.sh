#!/bin/sh
# Takes a service of nixlet's away with all that it made: pods, images, data; and nixlet itself, unless another service of it is left.
# What others put into its directories stays, and so do the Nix store and a configuration that was changed.
set -eu

: "${name:=nixlet}" "${opt:=/opt/nixlet}" "${bin:=/usr/local/bin}" "${units:=/etc/systemd/system}"
: "${config:=/etc/nixlet}" "${share:=/usr/local/share}"
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:$PATH:/nix/var/nix/profiles/default/bin
export PATH
unit=$units/$name.service

[ "$(id -u)" = 0 ] || { echo "error: only root can take nixlet away; run this as root, for example with sudo" >&2; exit 125; }
if [ -d "$opt" ] && command -v flock >/dev/null; then
  exec 9>"$opt/.lock"
  flock -n 9 || { echo "error: an installation of nixlet is running; wait until it has ended" >&2; exit 125; }
fi
if [ -f "$unit" ] && [ ! -x "$bin/nixlet" ]; then
  echo "error: $bin/nixlet is not there, which alone can take away what the node of $unit made: pods, mounts, data" >&2
  echo "hint: install nixlet once more (install.sh), then run this; if that node made nothing, delete $unit before" >&2
  exit 125
fi
if command -v systemctl >/dev/null; then
  if [ -d /run/systemd/system ]; then systemctl stop "$name" 2>/dev/null || true; fi
  systemctl disable --quiet "$name" 2>/dev/null || true
fi
had_unit=
shared=
if [ -f "$unit" ]; then
  had_unit=yes
  # Two services may have been told the same directory; the node in it is the other one's as well.
  node=$("$bin/nixlet" uninstall --unit "$unit" 2>/dev/null || true)
  for other in "$units"/nixlet*.service; do
    if [ -n "$node" ] && [ "$other" != "$unit" ] && [ "$("$bin/nixlet" uninstall --unit "$other" 2>/dev/null || true)" = "$node" ]; then
      shared=$other
    fi
  done
  if [ -n "$shared" ]; then
    echo "Kept: the node with all that it made, which $shared starts as well."
  else
    "$bin/nixlet" uninstall --unit "$unit" --ignore-missing --yes
  fi || {
    echo "error: the node was not taken away, see above, and so neither was nixlet; run this again when that is mended" >&2
    exit 125
  }
fi
# With what an installation that was killed left beside them.
rm -f "$unit" "$unit.env" "$unit.new" "$unit.env.new" "$units/.$name.service.new" "$units/.$name.service.env.new"
[ ! -e "$unit.d" ] || echo "Kept: $unit.d, which somebody else made."
if [ -d /run/systemd/system ] && command -v systemctl >/dev/null; then
  systemctl daemon-reload
  systemctl reset-failed "$name" 2>/dev/null || true
fi

for other in "$units"/nixlet*.service; do
  if [ -e "$other" ]; then
    echo "Kept: nixlet itself, which $other needs."
    rm -f "$bin/$name-killall.sh" "$bin/$name-uninstall.sh"
    exit 0
  fi
done

# Without a unit nothing says where the node is; what has no owner is not deleted for that, nor forgotten.
if [ -z "$had_unit" ] && [ -x "$bin/nixlet" ] && "$bin/nixlet" uninstall >/dev/null 2>&1; then
  echo "error: $unit is not there, and a node's data are, where a node has them that is told nothing else" >&2
  echo "hint: see what would go with: $bin/nixlet uninstall; take it away with: $bin/nixlet uninstall --yes; then run this again" >&2
  exit 125
fi

if [ -f "$config/config.yaml" ]; then
  if [ -x "$bin/nixlet" ] && "$bin/nixlet" config example | cmp -s - "$config/config.yaml"; then
    rm -f "$config/config.yaml"
  else
    echo "Kept: $config/config.yaml, which was changed since the installation."
  fi
fi
rmdir "$config" 2>/dev/null || true
if [ -s "$opt/packages" ]; then
  echo "Kept: the system's packages that the installation brought. To remove them: apt-get purge $(sort -u "$opt/packages" | xargs)"
fi
rm -f "$share/bash-completion/completions/nixlet" "$share/zsh/site-functions/_nixlet" "$share/fish/vendor_completions.d/nixlet.fish"
for directory in bash-completion/completions bash-completion zsh/site-functions zsh fish/vendor_completions.d fish; do
  rmdir "$share/$directory" 2>/dev/null || true
done
rm -f "$bin/nixlet" "$bin/.nixlet.new"
# One by one: the directory may be one that others use, too.
unfinished=$(cat "$opt/.unfinished" 2>/dev/null || true)
case $unfinished in "$opt"/?*) rm -rf "$unfinished" ;; esac
for version in "$opt"/*; do
  if [ -f "$version/.nixlet-stamp" ]; then
    echo "$version" >"$opt/.unfinished"
    rm -rf "$version"
  fi
done
rm -rf "$opt/.before" "$opt/.before.new" "$opt/.before.done" "$opt/.ready"
for file in packages current current.new previous .unfinished .lock; do rm -f "$opt/$file"; done
rmdir "$opt" 2>/dev/null || [ ! -d "$opt" ] || echo "Kept: what others have in $opt"
rm -f "$bin/$name-killall.sh" "$bin/$name-uninstall.sh"
