# shellcheck shell=sh
# Shared by install.sh and the programs in scripts/: Pythons, and environments of them that hold nixlet. For every POSIX shell;
# sourced after packages.sh, not run.

# The versions of Python that nixlet supports.
known_pythons='3.11 3.12 3.13 3.14'
oldest_python=${known_pythons%% *}

# What says of an environment that it is whole, and what it was made from.
environment_stamp=.nixlet-stamp

# is_python PROGRAM [VERSION]: whether it is a supported Python that can make environments, of that version.
is_python() {
  "$1" -I -c "import sys, ensurepip, venv; sys.exit('%d.%d' % sys.version_info[:2] not in '${2-$known_pythons}'.split())" 2>/dev/null
}

# python_of VERSION: the program of a version ("3.13"), on PATH or one of pyenv's.
python_of() {
  for environment_program in "$(command -v "python$1")" "${PYENV_ROOT:-${HOME:-/root}/.pyenv}/versions/$1".*/bin/python3; do
    # pyenv puts programs on PATH that only say that their version is not chosen.
    if [ -x "$environment_program" ] && is_python "$environment_program" "$1"; then
      echo "$environment_program"
      return
    fi
  done
  return 1
}

# find_python: a supported Python, the system's own if it is one; nothing where there is none.
find_python() {
  if is_python python3; then
    command -v python3
    return
  fi
  for environment_version in 3.13 3.12 3.11 3.14; do
    python_of "$environment_version" && return
  done
  return 1
}

suitable_python() {
  find_python || die "no Python $oldest_python or later with the venv module is installed"
}

# is_sound VENV: whether an environment is whole. One whose making was cut off has no pip that works, and neither has one whose
# Python was replaced by another version, which looks into a directory of its own.
is_sound() {
  if [ -f "$1/$environment_stamp" ]; then
    "$1/bin/python" -I -c 'import pip'
  else
    "$1/bin/python" -I -m pip --version
  fi >/dev/null 2>&1
}

# make_environment VENV PYTHON REQUIREMENTS [PIP'S OPTIONS…]: an environment with what a lock says, by its hashes.
make_environment() {
  environment_place=$1
  environment_python=$2
  environment_lock=$3
  shift 3
  # -I: nothing is imported from the working directory, which may be anybody's.
  if ! is_sound "$environment_place"; then
    rm -f "$environment_place/$environment_stamp"
    "$environment_python" -I -m venv --clear "$environment_place" >&2 </dev/null || return 1
  fi
  "$environment_place/bin/python" -I -m pip --disable-pip-version-check --quiet --no-input \
    install "$@" --require-hashes -r "$environment_lock" >&2 </dev/null
}

# site_of VENV: where an environment's modules are.
site_of() {
  "$1/bin/python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

# write_program VENV: the program nixlet, as an installation by pip would make it.
write_program() {
  environment_first="#!$1/bin/python -P"
  # The kernel cuts such a line at a blank, and after 127 bytes. There a shell reads two lines that are a string for Python.
  if [ ${#1} -gt 100 ] || [ "$1" != "$(printf %s "$1" | tr -d '[:space:]')" ]; then
    environment_first=$(printf "#!/bin/sh\n'''exec' \"%s/bin/python\" -P \"\$0\" \"\$@\"\n' '''" "$1")
  fi
  cat >"$1/bin/nixlet" <<SCRIPT
$environment_first
import sys
from nixlet.__main__ import main
sys.exit(main())
SCRIPT
  chmod 755 "$1/bin/nixlet"
}
