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
if command -v systemctl >/dev/null; then
  if [ -d /run/systemd/system ]; then systemctl stop "$name" 2>/dev/null || true; fi
  systemctl disable --quiet "$name" 2>/dev/null || true
fi
if [ -f "$unit" ] && [ -x "$bin/nixlet" ]; then
  "$bin/nixlet" uninstall --unit "$unit" --ignore-missing --yes || {
    echo "error: the node was not taken away, see above, and so neither was nixlet; run this again when that is mended" >&2
    exit 125
  }
fi
rm -f "$unit" "$unit.env"
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
rm -f "$bin/nixlet"
rm -rf "$opt"
rm -f "$bin/$name-killall.sh" "$bin/$name-uninstall.sh"
