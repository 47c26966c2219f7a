# Shared by the programs in scripts/: messages, and the system's packages. Sourced, not run.

say() { printf '\033[2m==>\033[0m %s\n' "$*" >&2; }
[ -t 2 ] || say() { printf '==> %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 125
}

# need_packages NAME…: installs those of Debian's packages that are missing; elsewhere it names what is missing and stops.
need_packages() {
  local missing=() name
  if ! command -v dpkg-query >/dev/null; then
    for name in "$@"; do has_counterpart "$name" || missing+=("$name"); done
    [ ${#missing[@]} -eq 0 ] && return
    die "this is no Debian; install the counterparts of these of its packages: ${missing[*]}"
  fi
  for name in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
  done
  [ ${#missing[@]} -eq 0 ] && return
  [ "$(id -u)" = 0 ] || die "these packages are missing and only root can install them: ${missing[*]}"
  say "Installing ${missing[*]}"
  local log
  log=$(mktemp)
  if ! { without_service_starts apt_install "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    rm -f "$log"
    die "apt-get could not install ${missing[*]}: see above; is a package mirror reachable?"
  fi
  rm -f "$log"
}

# has_counterpart NAME: whether what one of Debian's packages brings is there, on a system that has it from elsewhere.
has_counterpart() {
  case $1 in
    etcd-server) command -v etcd ;;
    nftables) command -v nft ;;
    nix-bin) command -v nix-build ;;
    busybox-static) [ -x /bin/busybox ] ;;
    containernetworking-plugins) [ -x /usr/lib/cni/bridge ] || [ -x /opt/cni/bin/bridge ] || [ -x /usr/libexec/cni/bridge ] ;;
    python3-venv) python3 -I -c 'import ensurepip, venv' ;;
    libc6-dev | libseccomp-dev) pkg-config --exists "${1%-dev}" || [ "$1" = libc6-dev ] ;;
    *) command -v "$1" ;;
  esac >/dev/null 2>&1
}

apt_install() {
  export DEBIAN_FRONTEND=noninteractive
  # The lists may be old or missing on a fresh machine; one refresh, then the installation.
  apt-get install -y --no-install-recommends "$@" || { apt-get update && apt-get install -y --no-install-recommends "$@"; }
}

# Debian starts a service as soon as its package is installed. nixlet runs its own containerd and must not bring up
# the system's: a policy that says no for the time of the installation, and leaves a policy of the admin's alone.
service_policy=/usr/sbin/policy-rc.d
service_policy_mark='# Made by nixlet for the time of an installation.'

# In a shell of its own, whose end takes the policy away however it comes; one that a killed shell left is known by its mark.
without_service_starts() (
  if [ -e "$service_policy" ] && ! grep -qxF "$service_policy_mark" "$service_policy"; then
    "$@"
    return
  fi
  trap 'rm -f "$service_policy"' EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  printf '#!/bin/sh\n%s\nexit 101\n' "$service_policy_mark" >"$service_policy"
  chmod 755 "$service_policy"
  "$@"
)
