# shellcheck shell=sh
# Shared by install.sh and the programs in scripts/: messages, and the system's packages. For every POSIX shell; sourced, not run.

# What a node needs of a machine, by the names of Debian's packages.
node_packages='containerd runc nix-bin containernetworking-plugins iptables catatonit python3 python3-venv'

# Whoever listened may have gone; what is to be done is done all the same.
say() {
  if [ -t 2 ]; then printf '\033[2m==>\033[0m %s\n' "$*" >&2; else printf '==> %s\n' "$*" >&2; fi || true
}

die() {
  printf 'error: %s\n' "$*" >&2 || true
  exit 125
}

# need_packages NAME…: installs those of Debian's packages that are missing; elsewhere it names what is missing and stops.
need_packages() {
  packages_missing=
  if ! command -v dpkg-query >/dev/null; then
    packages_missing=$(without_counterparts "$@")
    [ -n "$packages_missing" ] || return 0
    die "this is no Debian; install the counterparts of these of its packages: $packages_missing"
  fi
  for packages_name in "$@"; do
    # shellcheck disable=SC2016 # dpkg-query's own variable
    if [ "$(dpkg-query -W -f '${db:Status-Status}' "$packages_name" 2>/dev/null)" != installed ]; then
      packages_missing="$packages_missing $packages_name"
    fi
  done
  # shellcheck disable=SC2086 # names have no blanks
  [ -z "$packages_missing" ] || install_packages $packages_missing
}

# install_packages NAME…: installs Debian's packages, and starts no service.
install_packages() {
  [ "$(id -u)" = 0 ] || die "these packages are missing and only root can install them: $*"
  say "Installing $*"
  packages_log=$(mktemp)
  if ! { without_service_starts apt_install "$@"; } >"$packages_log" 2>&1 </dev/null; then
    tail -n 20 "$packages_log" >&2
    rm -f "$packages_log"
    die "apt-get could not install $*: see above; is a package mirror reachable?"
  fi
  rm -f "$packages_log"
}

# without_counterparts NAME…: those of Debian's packages of whose content this machine has nothing, wherever it may come from.
without_counterparts() {
  packages_without=
  for packages_name in "$@"; do
    has_counterpart "$packages_name" || packages_without="$packages_without $packages_name"
  done
  echo "${packages_without# }"
}

# has_counterpart NAME: whether what one of Debian's packages brings is there, on a system that has it from elsewhere.
has_counterpart() {
  case $1 in
    etcd-server) command -v etcd ;;
    uidmap) command -v newuidmap ;;
    nftables) command -v nft ;;
    nix-bin) command -v nix-build ;;
    busybox-static) [ -x /bin/busybox ] ;;
    containernetworking-plugins) [ -x /usr/lib/cni/bridge ] || [ -x /opt/cni/bin/bridge ] || [ -x /usr/libexec/cni/bridge ] ;;
    python3-venv) python3 -I -c 'import ensurepip, venv' ;;
    libc6-dev | libseccomp-dev) pkg-config --exists "${1%-dev}" || [ "$1" = libc6-dev ] ;;
    *) command -v "$1" ;;
  esac >/dev/null 2>&1
}

# package_of MANAGER NAME: what another system's package manager calls one of Debian's packages; nothing where it has none.
package_of() {
  case $1:$2 in
    apt-get:*) echo "$2" ;;
    *:python3-venv | dnf:nix-bin | zypper:nix-bin) ;;
    *:nix-bin) echo nix ;;
    zypper:python3) echo python313 ;;
    pacman:python3) echo python ;;
    dnf:iptables) echo iptables-nft ;;
    zypper:containernetworking-plugins | pacman:containernetworking-plugins | apk:containernetworking-plugins) echo cni-plugins ;;
    *) echo "$2" ;;
  esac
}

# what_for NAME: what a node needs one of Debian's packages for.
what_for() {
  case $1 in
    containerd) echo 'runs the containers' ;;
    runc) echo 'starts each container' ;;
    nix-bin) echo 'Nix, whose store paths containers are made of' ;;
    containernetworking-plugins) echo "the CNI plugins, which make pods' networks" ;;
    iptables) echo "leads packets to pods' ports" ;;
    catatonit) echo "holds a pod's namespaces" ;;
    python3*-venv) echo "Python's modules venv and ensurepip" ;;
    python3*) echo "Python $oldest_python or later" ;;
  esac
}

# package_manager: the one of this system; nothing where it has none that is known here.
package_manager() {
  for packages_name in apt-get dnf zypper pacman apk; do
    if command -v "$packages_name" >/dev/null; then
      echo "$packages_name"
      return
    fi
  done
}

# how_to_install MANAGER NAME…: a command that installs the counterparts of Debian's packages, and what it can't install.
how_to_install() {
  packages_manager=$1
  packages_there=
  packages_elsewhere=
  shift
  for packages_name in "$@"; do
    packages_there="$packages_there $([ -z "$packages_manager" ] || package_of "$packages_manager" "$packages_name")"
    case $packages_manager:$packages_name in
      dnf:nix-bin | zypper:nix-bin) packages_elsewhere='Nix from https://nixos.org/download' ;;
    esac
  done
  # shellcheck disable=SC2086,SC2116 # blanks too many go
  packages_there=$(echo $packages_there)
  case ${packages_there:+$packages_manager} in
    apt-get | dnf | zypper) echo "$packages_manager install $packages_there" ;;
    pacman) echo "pacman -S $packages_there" ;;
    apk) echo "apk add $packages_there" ;;
  esac
  [ -z "$packages_elsewhere" ] || echo "$packages_elsewhere"
}

apt_install() {
  export DEBIAN_FRONTEND=noninteractive
  # The lists may be old or missing on a fresh machine; one refresh, then the installation.
  # A fresh machine often updates itself meanwhile, which is waited for. Nothing that is there has to go.
  set -- -y --no-install-recommends --no-remove -o DPkg::Lock::Timeout=300 "$@"
  apt-get install "$@" || { apt-get update && apt-get install "$@"; }
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
