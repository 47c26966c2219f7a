#!/bin/sh
# install.sh [server|agent] [ARGUMENTS OF IT…]: installs nixlet as a service, or brings an installed one up to date.
#
# In a checkout or an unpacked archive of nixlet it installs that one. From a pipe (… | sh -s - server) it has to be told where nixlet
# comes from. Run once more without arguments, it keeps those that the service has.
#
# INSTALL_NIXLET_SOURCE         a directory, an archive (a file or an https:// address) or a git repository (git+https://…, ….git)
# INSTALL_NIXLET_SHA256         the checksum that the archive must have; needed for one that comes by http://
# INSTALL_NIXLET_VERSION        the version that it must be; of a git repository, the tag or branch to take
# INSTALL_NIXLET_EXEC           "server" or "agent" and arguments, as on the command line, before what is there
# INSTALL_NIXLET_NAME           the service is called nixlet-NAME; else nixlet, or nixlet-agent
# INSTALL_NIXLET_SKIP_START     true: the service is enabled, not started
# INSTALL_NIXLET_SKIP_ENABLE    true: the service is neither enabled nor started
# INSTALL_NIXLET_SKIP_DOWNLOAD  true: nothing is fetched; the source must have a directory wheels (scripts/offline makes one)
# INSTALL_NIXLET_SKIP_PACKAGES  true: packages of the system that are missing are named, not installed
# INSTALL_NIXLET_FORCE_RESTART  true: the service is restarted also if nothing changes
# INSTALL_NIXLET_READY_SECONDS  how long a new version may take to get ready before the one before comes back; 300
# INSTALL_NIXLET_BIN_DIR        where the link to the program and the scripts go; /usr/local/bin
# INSTALL_NIXLET_SYSTEMD_DIR    where the unit and its variables go; /etc/systemd/system
# INSTALL_NIXLET_OPT_DIR, INSTALL_NIXLET_CONFIG_DIR, INSTALL_NIXLET_SHARE_DIR
#                               where versions, config.yaml and completion go; /opt/nixlet, /etc/nixlet, /usr/local/share
#
# Variables named NIXLET_…, CONTAINERD_… and those of proxies are kept for the service (NIXLET_TOKEN, NIXLET_URL, HTTPS_PROXY).
set -eu

fail() {
  printf 'error: %s\n' "$1" >&2
  [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
  exit 125
}

# The directory that this file lies in, if it lies in nixlet; from a pipe there is none.
own_source() {
  case ${0##*/} in
    install.sh) ;;
    *) return 1 ;;
  esac
  [ -f "$0" ] || return 1
  own=$(cd "$(dirname "$0")" && pwd -P) || return 1
  is_source "$own" && echo "$own"
}

is_source() {
  [ -f "$1/install.sh" ] && [ -f "$1/scripts/lib/installing.sh" ] && [ -f "$1/src/nixlet/__init__.py" ]
}

needs() {
  command -v "$1" >/dev/null || fail "$1 is needed to $2, and is not installed" "install it with the system's package manager, or name a directory: INSTALL_NIXLET_SOURCE"
}

# fetch ADDRESS FILE
fetch() {
  if command -v curl >/dev/null; then
    # What is not compared with a checksum must not be led on to http://.
    curl -fsSL --retry 3 ${checked_by_name:+--proto "=https"} -o "$2" "$1" </dev/null
  else
    needs wget "fetch $1"
    wget ${checked_by_name:+--max-redirect=0} -O "$2" "$1" </dev/null 2>"$2.said" || { tail -n 3 "$2.said" >&2; false; }
  fi || fail "$1 could not be fetched: see above"
}

# unpack ARCHIVE: into the directory "source" of the temporary one.
unpack() {
  if [ -n "${INSTALL_NIXLET_SHA256-}" ]; then
    found=$(sha256sum "$1" | cut -d ' ' -f 1)
    [ "$found" = "$INSTALL_NIXLET_SHA256" ] || fail "$1 has the checksum $found, not $INSTALL_NIXLET_SHA256" "it was damaged or exchanged: fetch it anew, and compare the checksum with that of the release"
  fi
  mkdir "$temporary/source"
  # o: the files become root's; written so, as every tar has it.
  tar -xof "$1" -C "$temporary/source" </dev/null || fail "$1 could not be unpacked: see above"
}

# obtain SOURCE: where the source is then is in $source.
obtain() {
  # Whether nothing but the address, whose certificate is checked, says that it is the right one.
  checked_by_name=$([ -n "${INSTALL_NIXLET_SHA256-}" ] || echo yes)
  if [ "${INSTALL_NIXLET_SKIP_DOWNLOAD-}" = true ]; then
    case $1 in
      git+* | git@* | *://* | *.git) fail "INSTALL_NIXLET_SKIP_DOWNLOAD is set, and $1 would have to be fetched" "name a directory or an archive that is there" ;;
    esac
  fi
  if [ -z "$checked_by_name" ]; then
    case $1 in
      http://*.git | https://*.git) ;;
      http://* | https://*) false ;;
      git+* | git@* | *://* | *.git) ;;
      *) [ -d "$1" ] ;;
    esac && fail "INSTALL_NIXLET_SHA256 is the checksum of an archive, and $1 is none" "leave it out, or name an archive"
  fi
  case $1 in
    git+* | git@* | ssh://* | *.git)
      needs git "fetch $1"
      case ${1#git+} in
        http://* | git://*) fail "anybody on the way can exchange what comes from $1" "take https:// or ssh://" ;;
      esac
      git -c protocol.http.allow=never clone --quiet --depth 1 ${INSTALL_NIXLET_VERSION:+--branch "$INSTALL_NIXLET_VERSION"} "${1#git+}" "$temporary/source" </dev/null >&2 ||
        fail "$1 could not be fetched: see above"
      # The tag or branch was taken; what version it is, it says itself.
      export INSTALL_NIXLET_VERSION=
      ;;
    https://*)
      fetch "$1" "$temporary/archive"
      unpack "$temporary/archive"
      ;;
    http://*)
      [ -n "${INSTALL_NIXLET_SHA256-}" ] || fail "anybody on the way can exchange what comes from $1" "take https://, or say the archive's checksum: INSTALL_NIXLET_SHA256"
      fetch "$1" "$temporary/archive"
      unpack "$temporary/archive"
      ;;
    *)
      if [ -d "$1" ]; then
        source=$1
        is_source "$1" || fail "the directory $1 holds no nixlet" "INSTALL_NIXLET_SOURCE names a checkout, an unpacked archive, or what scripts/offline made"
        return
      fi
      [ -f "$1" ] || fail "INSTALL_NIXLET_SOURCE names $1, which is not there"
      unpack "$1"
      ;;
  esac
  # An archive has its files in one directory, or as they are.
  for source in "$temporary/source" "$temporary/source"/*; do
    ! is_source "$source" || return 0
  done
  fail "$1 holds no nixlet"
}

main() {
  # cd must lead where it says.
  unset CDPATH
  case ${1-} in
    -h | --help)
      # From a pipe there is no file to read it from.
      if [ -f "$0" ]; then sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d'; else echo "see the head of install.sh, or docs/install.md"; fi
      exit
      ;;
  esac
  if [ -n "${INSTALL_NIXLET_SOURCE-}" ]; then
    # The source's own install.sh knows best how it is installed; it lives as long as it is needed.
    temporary=$(mktemp -d)
    trap 'rm -rf "$temporary"' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    obtain "$INSTALL_NIXLET_SOURCE"
    INSTALL_NIXLET_SOURCE='' sh "$source/install.sh" "$@" </dev/null
    return
  fi
  top=$(own_source) || fail "nothing says where nixlet is to come from" \
    "name a directory, an archive or a git repository: INSTALL_NIXLET_SOURCE; or run install.sh in a checkout"
  . "$top/scripts/lib/packages.sh"
  . "$top/scripts/lib/environment.sh"
  . "$top/scripts/lib/service.sh"
  . "$top/scripts/lib/installing.sh"
  install_nixlet "$top" "$@"
}

# A script that was cut off on its way through a pipe ends before it: the brace is missing.
{ main "$@"; exit; }
