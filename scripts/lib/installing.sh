# shellcheck shell=sh
# What install.sh does with a source that is there. For every POSIX shell; sourced after packages.sh, environment.sh and service.sh.
#
# A version lies in OPT/VERSION and is whole when its stamp is there. What is in force is the link BIN/nixlet together with the unit and
# its variables. Before these three are changed, copies of them are put into OPT/.before, which goes when the new version is ready: as
# long as it is there, the change can be taken back, by this run or by a later one. Where the new version is not to be started, that
# becomes OPT/.ready: whether what is in force gets ready is not known, and a later version that doesn't goes back to what was before.

# install_nixlet TOP [server|agent] [ARGUMENTS…]: installs the checkout or unpacked archive TOP.
install_nixlet() {
  top=$1
  shift
  settle_places
  check_machine
  settle_command "$@"
  check_version
  check_packages
  umask 022
  building=
  changing=
  restart_needed=
  new_unit=$units/.$name.service.new
  new_variables=$units/.$name.service.env.new
  trap 'exit 129' HUP
  trap 'exit 130' INT
  # That nobody reads what is said is no reason to stop.
  trap : PIPE
  trap 'exit 143' TERM
  trap 'leave "$?"' EXIT
  mkdir -p "$opt"
  lock_installation
  take_back_what_was_cut_off
  remove_unfinished
  bring_packages
  build_version
  check_settings
  settle_files
  if nothing_changes; then
    say "nixlet $version is installed as $name already, and nothing has changed"
    tidy
    return
  fi
  put_in_force
  start_service
  tidy
}

# leave STATUS: the end, however it comes; what is half done is taken back.
leave() {
  trap '' HUP INT PIPE TERM
  trap - EXIT
  if [ -n "$changing" ] && [ -d "$before" ]; then
    say "Interrupted: taking back what was changed"
    take_back "$before"
    ! has_systemd || run_as_before
  fi
  if [ -n "$building" ]; then remove_version "$building"; fi
  rm -f "$new_unit" "$new_variables"
  exit "$1"
}

# run_as_before: the service as it was before, also if the new version hangs on its way up: that is no state that try-restart knows.
run_as_before() {
  case $state_before in
    active | activating | reloading) systemctl restart --no-block "$name" || true ;;
    *) systemctl stop --no-block "$name" 2>/dev/null || true ;;
  esac
}

settle_places() {
  opt=${INSTALL_NIXLET_OPT_DIR:-/opt/nixlet}
  bin=${INSTALL_NIXLET_BIN_DIR:-/usr/local/bin}
  units=${INSTALL_NIXLET_SYSTEMD_DIR:-/etc/systemd/system}
  config=${INSTALL_NIXLET_CONFIG_DIR:-/etc/nixlet}
  share=${INSTALL_NIXLET_SHARE_DIR:-/usr/local/share}
  for place in "$opt" "$bin" "$units" "$config" "$share"; do
    case $place in
      *[!A-Za-z0-9_./+-]*) die "the directory '$place' has a blank or a sign in its name that a unit can't have; choose another one" ;;
      /*) ;;
      *) die "the directory '$place' must be named from / on" ;;
    esac
  done
  before=$opt/.before
  ready=$opt/.ready
  unfinished=$opt/.unfinished
  case ${INSTALL_NIXLET_READY_SECONDS:-300} in
    0* | *[!0-9]*) die "INSTALL_NIXLET_READY_SECONDS is '$INSTALL_NIXLET_READY_SECONDS', and no number of seconds" ;;
  esac
  # Nix has a place of its own, which a service's PATH has not, nor that of sudo.
  PATH=$service_path:$PATH:/nix/var/nix/profiles/default/bin
  export PATH
}

check_machine() {
  [ "$(uname -s)" = Linux ] || die "nixlet runs on Linux, and this is $(uname -s)"
  [ "$(id -u)" = 0 ] || die "only root can install nixlet; run this as root, for example with sudo"
  [ ! -e "$bin/nixlet" ] || is_own_link "$bin/nixlet" || die "$bin/nixlet is there, and no link of this installer's; move it away"
}

# is_own_link FILE: whether it leads to the program of a version that an installer made.
is_own_link() {
  own_target=$(readlink "$1") || return 1
  case $own_target in
    /*/bin/nixlet) [ -f "${own_target%/bin/nixlet}/$environment_stamp" ] ;;
    *) return 1 ;;
  esac
}

# check_unit: whether the unit may be replaced.
check_unit() {
  [ ! -L "$unit" ] || die "$unit is a link, to $(readlink "$unit"): somebody made it so, or masked the service; take it away (systemctl unmask $name)"
}

# settle_command [server|agent] [ARGUMENTS…]: the service's name, and what it starts (k3s's rules). Without a word of that, what an
# earlier installation has stays.
settle_command() {
  given=$#
  verb=
  case ${1-} in server | agent) verb=$1 && shift ;; esac
  if [ -n "${INSTALL_NIXLET_EXEC-}" ]; then
    # xargs parts words by quotes and blanks as a shell does, and expands nothing.
    exec_words=$(printf '%s' "$INSTALL_NIXLET_EXEC" | xargs -n 1 printf '%s\n') ||
      die "INSTALL_NIXLET_EXEC can't be parted into words: $INSTALL_NIXLET_EXEC"
    exec_count=$#
    while IFS= read -r exec_word; do
      [ -z "$exec_word" ] || set -- "$@" "$exec_word"
    done <<EXEC
$exec_words
EXEC
    given=$((given + $# - exec_count))
    # What it says goes before the arguments.
    while [ "$exec_count" -gt 0 ]; do
      exec_count=$((exec_count - 1))
      exec_word=$1
      shift
      set -- "$@" "$exec_word"
    done
    case $verb:${1-} in
      :server | :agent | server:server | agent:agent) verb=$1 && shift ;;
      server:agent | agent:server) die "INSTALL_NIXLET_EXEC asks for $1, and the command line for $verb" ;;
    esac
  fi
  case ${1--} in
    -*) ;;
    *) die "a node is a server or an agent, not '$1'; as in: install.sh server --snapshotter nix" ;;
  esac
  joins=
  if [ -z "$verb" ] && [ -n "${NIXLET_URL-}" ]; then
    verb=agent
    joins=yes
    [ -n "${NIXLET_TOKEN-}${NIXLET_TOKEN_FILE-}" ] ||
      die "NIXLET_URL names the cluster that this node is to join, but neither NIXLET_TOKEN nor NIXLET_TOKEN_FILE says with which token"
  fi
  if [ -n "${INSTALL_NIXLET_NAME-}" ]; then
    name=nixlet-$INSTALL_NIXLET_NAME
  elif [ "$verb" = agent ] || { [ -z "$verb" ] && [ ! -e "$units/nixlet.service" ] && [ -e "$units/nixlet-agent.service" ]; }; then
    name=nixlet-agent
  else
    name=nixlet
  fi
  case $name in
    *[!A-Za-z0-9_.-]*) die "'$name' is no name for a service: letters, digits, dots, dashes and underscores are" ;;
  esac
  unit=$units/$name.service
  variables=$unit.env
  check_unit
  if [ -z "${INSTALL_NIXLET_CONFIG_DIR-}" ] && [ -f "$unit" ]; then
    # What an earlier installation was told of that.
    config_before=$(sed -n 's|^Environment=NIXLET_CONFIG_FILE=\(/[A-Za-z0-9_./+-]*\)/config\.yaml$|\1|p' "$unit")
    config=${config_before:-$config}
  fi
  # Everybody may read a unit, and a command line. What is secret in it becomes a variable.
  argument_count=$#
  while [ "$argument_count" -gt 0 ]; do
    argument_count=$((argument_count - 1))
    argument=$1
    shift
    case $argument in
      --token=* | --agent-token=* | --datastore-endpoint=*) keep_secret "${argument%%=*}" "${argument#*=}" ;;
      -t | --token | --agent-token | --datastore-endpoint)
        [ "$argument_count" -gt 0 ] || die "$argument needs a value"
        keep_secret "$argument" "$1"
        argument_count=$((argument_count - 1))
        shift
        ;;
      -t?*) keep_secret -t "${argument#-t}" ;;
      *) set -- "$@" "$argument" ;;
    esac
  done
  kept=
  if [ "$given" = 0 ] && [ -e "$unit" ]; then
    if [ -z "$verb" ]; then
      words=$(started_by "$unit")
      kept=yes
    elif [ -n "$joins" ]; then
      # The variables of an agent alone say nothing of its flags.
      words=$(started_by "$unit" 2>/dev/null) || words=
      case $words in ' agent' | ' agent '*) kept=yes ;; esac
    fi
  fi
  if [ -n "$kept" ]; then keep_old_secrets; else words=$(quoted_words "${verb:-server}" "$@"); fi
  # For check_settings, which runs it: positional parameters are a function's own.
  argument_list=$(for argument in "${verb:-server}" "$@"; do printf '%s\n' "$argument"; done)
}

# keep_secret FLAG VALUE: a variable for the service instead of a flag.
keep_secret() {
  case $1 in
    -t | --token) export NIXLET_TOKEN="$2" ;;
    --agent-token) export NIXLET_AGENT_TOKEN="$2" ;;
    --datastore-endpoint) export NIXLET_DATASTORE_ENDPOINT="$2" ;;
  esac
}

# keep_old_secrets: the same for those among the words of a unit that is there; what is given for this run goes before them.
keep_old_secrets() {
  case $words in *--token* | *--agent-token* | *--datastore-endpoint* | *' -t'* | *'"-t'*) ;; *) return 0 ;; esac
  secret_flag=
  secret_found=
  words_left=
  while IFS= read -r secret_raw && IFS= read -r secret_word; do
    if [ -n "$secret_flag" ]; then
      keep_old_secret "$secret_flag" "$secret_word"
      secret_flag=
      continue
    fi
    case $secret_word in
      --token=* | --agent-token=* | --datastore-endpoint=*) keep_old_secret "${secret_word%%=*}" "${secret_word#*=}" ;;
      -t | --token | --agent-token | --datastore-endpoint) secret_flag=$secret_word ;;
      -t?*) keep_old_secret -t "${secret_word#-t}" ;;
      *) words_left="$words_left $secret_raw" ;;
    esac
  done <<WORDS
$(printf '%s\n' "$words" | parted_words; echo end)
WORDS
  [ -z "$secret_found" ] || words=$words_left
}

keep_old_secret() {
  secret_found=yes
  case $1 in
    -t | --token) [ -n "${NIXLET_TOKEN+given}" ] || keep_secret "$@" ;;
    --agent-token) [ -n "${NIXLET_AGENT_TOKEN+given}" ] || keep_secret "$@" ;;
    --datastore-endpoint) [ -n "${NIXLET_DATASTORE_ENDPOINT+given}" ] || keep_secret "$@" ;;
  esac
}

# One at a time.
lock_installation() {
  command -v flock >/dev/null || return 0
  exec 9>"$opt/.lock"
  flock -n 9 || die "another installation is running; wait until it has ended"
}

# Nix and Python may come from elsewhere than packages; what is there is not installed once more.
missing_packages() {
  missing=
  for package in $node_packages; do
    case $package in
      nix-bin) command -v nix-store >/dev/null || [ -S /nix/var/nix/daemon-socket/socket ] || missing="$missing nix-bin" ;;
      python3 | python3-venv) find_python >/dev/null || missing="$missing $package" ;;
      *) has_counterpart "$package" || missing="$missing $package" ;;
    esac
  done
  missing=${missing# }
}

# check_packages: an end in words where something is missing that can't be brought; nothing has been changed by then.
check_packages() {
  missing_packages
  [ -n "$missing" ] || return 0
  old_python=
  case " $missing " in
    *' python3 '*)
      old_python=$(python3 -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || old_python=
      case " $known_pythons " in *" $old_python "*) old_python= ;; esac
      ;;
  esac
  if [ -n "$old_python" ] && [ "$(package_manager)" = apt-get ]; then
    # A release's python3 stays what it is. Another one beside it has a name of its own.
    other_python=$(packaged_python) || name_missing
    missing=$(echo "$missing" | sed "s/python3/$other_python/g")
  fi
  if [ "$(package_manager)" != apt-get ] || [ "${INSTALL_NIXLET_SKIP_DOWNLOAD-}" = true ] || [ "${INSTALL_NIXLET_SKIP_PACKAGES-}" = true ]; then
    name_missing
  fi
}

# packaged_python: the package of a supported Python, where apt knows one with its module venv.
packaged_python() {
  for other_version in 3.13 3.12 3.11 3.14; do
    if apt-cache show "python$other_version-venv" >/dev/null 2>&1; then
      echo "python$other_version"
      return
    fi
  done
  return 1
}

bring_packages() {
  if [ -n "$missing" ]; then
    # The lock is ours alone, not of a service that a package might start.
    # shellcheck disable=SC2086 # names have no blanks
    install_packages $missing 9>&-
    # shellcheck disable=SC2086
    printf '%s\n' $missing >>"$opt/packages"
    missing_packages
    [ -z "$missing" ] || name_missing
  fi
  python=$(find_python)
}

# name_missing: what is missing, what for, and how to get it.
name_missing() {
  {
    echo "error: this machine lacks what a node needs:"
    for package in $missing; do
      printf '    %-29s %s\n' "$package" "$(what_for "$package")"
    done
    case " $missing " in
      *' python3 '*)
        ! command -v python3 >/dev/null ||
          echo "    (there is a python3, of version $(python3 -I -c 'import sys; print("%d.%d" % sys.version_info[:2])'): nixlet runs on $known_pythons, and needs venv)"
        ;;
    esac
    if [ -n "${old_python-}" ] && [ "$(package_manager)" = apt-get ]; then
      missing=$(printf ' %s ' "$missing" | sed -e 's/ python3 / /' -e 's/ python3-venv / /')
      echo "hint: apt knows no other Python: apt-get update, if it was never asked; or bring one of these versions, with venv, to PATH"
    fi
    # shellcheck disable=SC2086 # names have no blanks
    how_to_install "$(package_manager)" $missing | sed 's/^/hint: /'
  } >&2
  exit 125
}

# check_version: which one the source is of.
check_version() {
  version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$top/src/nixlet/__init__.py")
  [ -n "$version" ] || die "$top is no source of nixlet: src/nixlet/__init__.py says no version"
  if [ -n "${INSTALL_NIXLET_VERSION-}" ] && [ "${INSTALL_NIXLET_VERSION#v}" != "$version" ]; then
    die "INSTALL_NIXLET_VERSION asks for $INSTALL_NIXLET_VERSION, and $top is nixlet $version"
  fi
}

# build_version: OPT/VERSION from the source, if it isn't there as a whole.
build_version() {
  python_version=$("$python" -I -c 'import sys; print(sys.version, sys.executable)')
  lock_key=$(
    {
      echo "$python_version"
      cat "$top/requirements/runtime.txt" "$top/scripts/lib/environment.sh"
    } | sha256sum | cut -c 1-16
  )
  key=$(
    {
      echo "$python_version"
      (cd "$top" && find src/nixlet nix requirements/runtime.txt scripts/lib/environment.sh -type f ! -path '*/__pycache__/*' \
        -exec sha256sum {} + | LC_ALL=C sort)
    } | sha256sum | cut -c 1-16
  )
  home=$opt/$version
  # Another content of the same version, as a checkout has it while it is worked on, has a place of its own.
  [ ! -e "$home/$environment_stamp" ] || grep -qx "$key" "$home/$environment_stamp" || home=$opt/$version-$(printf %.8s "$key")
  if [ -f "$home/$environment_stamp" ] && grep -qx "$key" "$home/$environment_stamp" && is_sound "$home"; then
    return
  fi
  like=$(environment_like "$lock_key")
  say "Installing nixlet $version into $home"
  if [ -e "$home" ] && [ ! -f "$home/$environment_stamp" ]; then
    die "$home is there, and was not made by this installer; move it away, or choose another INSTALL_NIXLET_OPT_DIR"
  fi
  remove_version "$home"
  building=$home
  # From here on it is known whose it is, also without its stamp.
  echo "$home" >"$unfinished"
  on_disk
  if [ -n "$like" ]; then
    "$python" -I -m venv --without-pip "$home" >&2 </dev/null
    copy_tree "$(site_of "$like")" "$(site_of "$home")" nixlet
  else
    install_requirements
  fi
  copy_tree "$top/src/nixlet" "$(site_of "$home")/nixlet"
  copy_tree "$top/nix" "$home/share/nix"
  write_program "$home"
  "$home/bin/python" -I -m compileall -q "$home/lib" >/dev/null 2>&1 || true
  chmod -R u=rwX,go=rX "$home"
  "$home/bin/nixlet" version >/dev/null || die "$home/bin/nixlet does not start: see above"
  on_disk
  printf '%s\n' "$key" "$lock_key" >"$home/$environment_stamp"
  rm -f "$unfinished"
  building=
}

# remove_version DIRECTORY: one that is cut off meanwhile is taken up by the next run.
remove_version() {
  echo "$1" >"$unfinished"
  on_disk
  rm -rf "$1"
  rm -f "$unfinished"
}

remove_unfinished() {
  [ -f "$unfinished" ] || return 0
  case $(cat "$unfinished") in
    "$opt"/?*) remove_version "$(cat "$unfinished")" ;;
  esac
}

# copy_tree FROM TO [NAME…]: a tree of files but for those names and byte code; not every tar can leave things out.
copy_tree() {
  "$python" -I -c 'import shutil, sys; shutil.copytree(*sys.argv[1:3], dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", *sys.argv[3:]))' "$@"
}

# environment_like KEY: a whole version whose requirements are the same; most upgrades need no network, and no time for it.
environment_like() {
  for old in "$opt"/*; do
    if [ -f "$old/$environment_stamp" ] && grep -qx "$1" "$old/$environment_stamp" && is_sound "$old"; then
      echo "$old"
      return
    fi
  done
}

# install_requirements: an environment with what the lock says, by its hashes, from PyPI or from the directory wheels.
install_requirements() {
  set --
  if [ -d "$top/wheels" ]; then
    set -- --no-index --find-links "$top/wheels"
  elif [ "${INSTALL_NIXLET_SKIP_DOWNLOAD-}" = true ]; then
    die "INSTALL_NIXLET_SKIP_DOWNLOAD is set, and $top has no directory wheels with what nixlet needs; scripts/offline makes a directory that has"
  fi
  if ! make_environment "$home" "$python" "$top/requirements/runtime.txt" --no-compile "$@"; then
    if [ $# = 0 ]; then
      die "pip could not install requirements/runtime.txt: see above; is PyPI reachable? Without: scripts/offline makes a directory that needs no network"
    fi
    die "pip could not install requirements/runtime.txt from $top/wheels: see above; it must be made for this Python ($("$python" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])')) and processor ($(uname -m))"
  fi
}

# What is relied on must be on the disk before.
on_disk() {
  sync -f "$opt" 2>/dev/null || sync
}

# check_settings: whether the new version understands what it is to be started with. What stays as it was is found out by its start.
check_settings() {
  [ -z "$kept" ] || return 0
  set --
  while IFS= read -r argument; do
    set -- "$@" "$argument"
  done <<ARGUMENTS
$argument_list
ARGUMENTS
  # Not another service's configuration, unless a variable names it.
  settings_file=
  if [ "$config" != /etc/nixlet ]; then
    settings_file=$config/config.yaml
    [ -e "$settings_file" ] || settings_file=/dev/null
  fi
  NIXLET_CONFIG_FILE=${NIXLET_CONFIG_FILE:-$settings_file} "$home/bin/nixlet" "$@" --show-config </dev/null >/dev/null || die "nixlet would not start with these settings: see above; nothing was changed"
}

# settle_files: what is to be in force, beside the places where it will be.
settle_files() {
  own_path=
  case $(command -v nix-store || true) in
    '' | /usr/local/sbin/* | /usr/local/bin/* | /usr/sbin/* | /usr/bin/* | /sbin/* | /bin/*) ;;
    *) own_path=$service_path:$(dirname "$(command -v nix-store)") ;;
  esac
  mkdir -p "$bin" "$units"
  unit_text "$top/deploy/nixlet.service" "$bin/nixlet$words" "$variables" "$([ "$config" = /etc/nixlet ] || echo "$config/config.yaml")" >"$new_unit"
  chmod 644 "$new_unit"
  # Tokens stand in it.
  rm -f "$new_variables"
  (umask 077 && : >"$new_variables")
  variables_text "$([ ! -e "$variables" ] || echo "$variables")" "$own_path" >"$new_variables" || exit 125
}

nothing_changes() {
  if [ "$(readlink "$bin/nixlet" || true)" = "$home/bin/nixlet" ] && cmp -s "$new_unit" "$unit" && cmp -s "$new_variables" "$variables" &&
    [ "${INSTALL_NIXLET_FORCE_RESTART-}" != true ] && [ -z "$restart_needed" ] && is_up_or_not_to_be; then
    # An editor may have given it another mode.
    chmod 600 "$variables"
    write_beside
    return 0
  fi
  return 1
}

is_up_or_not_to_be() {
  ! has_systemd || skips_start || [ "$(property "$name" ActiveState)" = active ]
}

skips_start() {
  [ "${INSTALL_NIXLET_SKIP_START-}" = true ] || [ "${INSTALL_NIXLET_SKIP_ENABLE-}" = true ]
}

# put_in_force: the link, the unit and its variables, each by one rename; what was there before is kept until the new version is ready.
put_in_force() {
  state_before=$(! has_systemd || property "$name" ActiveState)
  if [ -d "$ready" ] && has_got_ready; then rm -rf "$ready"; fi
  # It may be somebody's work.
  if [ -f "$unit" ] && ! grep -qxF "EnvironmentFile=-$variables" "$unit"; then
    cp -p "$unit" "$unit.orig"
    say "Kept: the unit that was there before, as $unit.orig"
  fi
  rm -rf "$before.new"
  (umask 077 && mkdir "$before.new")
  echo "$name" >"$before.new/name"
  [ ! -L "$bin/nixlet" ] || readlink "$bin/nixlet" >"$before.new/link"
  [ ! -f "$unit" ] || cp -p "$unit" "$before.new/unit"
  [ ! -f "$variables" ] || cp -p "$variables" "$before.new/variables"
  on_disk
  changing=yes
  mv "$before.new" "$before"
  mv -f "$new_variables" "$variables"
  mv -f "$new_unit" "$unit"
  point_at "$home/bin/nixlet"
  on_disk
  write_beside
}

# has_got_ready: whether what is in force, and was not started then, got ready since; or is another service's.
has_got_ready() {
  [ "$(cat "$ready/name")" = "$name" ] || return 0
  [ "$state_before" = active ] && [ "$(property "$name" InvocationID)" != "$(cat "$ready/run")" ]
}

# point_at PROGRAM: what the link BIN/nixlet leads to, by one rename.
point_at() {
  rm -f "$bin/.nixlet.new"
  ln -s "$1" "$bin/.nixlet.new"
  mv -f "$bin/.nixlet.new" "$bin/nixlet"
}

# write_beside: what an earlier version does not mind: completion, the example, the scripts that take nixlet away.
write_beside() {
  write_file 644 "$share/bash-completion/completions/nixlet" "$home/bin/nixlet" completion bash
  write_file 644 "$share/zsh/site-functions/_nixlet" "$home/bin/nixlet" completion zsh
  write_file 644 "$share/fish/vendor_completions.d/nixlet.fish" "$home/bin/nixlet" completion fish
  if [ ! -e "$config/config.yaml" ] && [ ! -L "$config/config.yaml" ]; then
    write_file 600 "$config/config.yaml" "$home/bin/nixlet" config example
  fi
  write_file 755 "$bin/$name-uninstall.sh" script_text uninstall
  write_file 755 "$bin/$name-killall.sh" script_text killall
}

# write_file MODE FILE COMMAND…: what a command prints, as a file that is there as a whole or not at all.
write_file() {
  file_mode=$1
  file_place=$2
  shift 2
  file_directory=$(dirname "$file_place")
  mkdir -p "$file_directory"
  file_new=$file_directory/.$(basename "$file_place").new
  rm -f "$file_new"
  (umask 077 && : >"$file_new")
  "$@" >"$file_new" </dev/null || { rm -f "$file_new"; die "$file_place could not be written: see above"; }
  chmod "$file_mode" "$file_new"
  mv -f "$file_new" "$file_place"
}

# script_text NAME: a script of deploy/ for this installation.
script_text() {
  cat <<SCRIPT
#!/bin/sh
name=$name
opt=$opt
bin=$bin
units=$units
config=$config
share=$share
SCRIPT
  sed 1d "$top/deploy/$1.sh"
}

start_service() {
  if [ "${INSTALL_NIXLET_SKIP_ENABLE-}" != true ] && command -v systemctl >/dev/null; then
    ! has_systemd || systemctl daemon-reload
    # Also where systemd doesn't run, as when the image of a machine is made.
    systemctl enable --quiet "$name" 2>/dev/null || say "systemctl could not enable $name: it won't start by itself with the machine"
  elif has_systemd; then
    systemctl daemon-reload
  fi
  if ! has_systemd || skips_start; then
    if [ ! -d "$ready" ] && [ -f "$before/link" ] && [ -f "$before/unit" ]; then
      if has_systemd; then property "$name" InvocationID; fi >"$before/run"
      mv "$before" "$ready"
    else
      in_force
    fi
    say "nixlet $version is installed; it was not started"
    if has_systemd; then
      say "Start it with: systemctl $([ "${INSTALL_NIXLET_SKIP_ENABLE-}" != true ] || echo 'enable --now ')$([ "${INSTALL_NIXLET_SKIP_ENABLE-}" = true ] || echo 'restart ')$name"
    else
      say "systemd does not run here. Start it with: $bin/nixlet$words"
    fi
    return
  fi
  say "Starting $name"
  if restart_until_ready; then
    in_force
    rm -rf "$ready"
    say "nixlet $version is ready; what a machine lacks, and how to use it: nixlet doctor, nixlet --help"
    return
  fi
  last_words "$name"
  if [ -f "$before/link" ] && [ -f "$before/unit" ]; then
    go_back "nixlet $version did not get ready as $name$unready_for: its last words are above"
  fi
  in_force
  die "nixlet $version is installed, but did not get ready as $name$unready_for: its last words are above; nixlet doctor tells what a node lacks"
}

restart_until_ready() {
  unready_for=
  service_before=$(property "$name" InvocationID)
  # It may have failed too often to be started again.
  systemctl reset-failed "$name" 2>/dev/null || true
  systemctl restart --no-block "$name" || return 1
  await_ready "$name" "$service_before" "${INSTALL_NIXLET_READY_SECONDS:-300}" && return
  [ "$(property "$name" ActiveState)" != activating ] || [ "$(property "$name" SubState)" = auto-restart ] ||
    unready_for=" in ${INSTALL_NIXLET_READY_SECONDS:-300} s (more is had by INSTALL_NIXLET_READY_SECONDS)"
  return 1
}

# in_force: nothing is taken back any more.
in_force() {
  mv "$before" "$before.done"
  rm -rf "$before.done"
}

# go_back WHY: to what was in force before, and an end with an error.
go_back() {
  bad=$version
  back_to=$before
  [ ! -d "$ready" ] || back_to=$ready
  earlier=$(cat "$back_to/link")
  say "Going back to what was there before"
  take_back "$back_to"
  if ! has_systemd; then
    die "$1; what was there before is in force again ($earlier)"
  fi
  if restart_until_ready; then
    rm -rf "$ready"
    die "$1; what was there before is in force again, and ready ($earlier)"
  fi
  last_words "$name"
  die "$1; what was there before is in force again ($earlier), but does not get ready either: $bad may not be to blame; nixlet doctor tells what a node lacks"
}

# take_back COPIES: makes the link, the unit and its variables what they were. It may be cut off, and done again.
take_back() {
  back=$(cat "$1/name")
  back_unit=$units/$back.service
  if [ ! -f "$1/unit" ] && command -v systemctl >/dev/null; then
    # A service that there was not before.
    systemctl disable --quiet "$back" 2>/dev/null || true
    ! has_systemd || systemctl stop "$back" 2>/dev/null || true
  fi
  if [ -f "$1/link" ]; then point_at "$(cat "$1/link")"; else rm -f "$bin/nixlet"; fi
  put_back "$1/unit" "$back_unit"
  put_back "$1/variables" "$back_unit.env"
  on_disk
  in_force
  if has_systemd; then systemctl daemon-reload; fi
}

put_back() {
  if [ -f "$1" ]; then
    cp -p "$1" "$2.new"
    mv -f "$2.new" "$2"
  else
    rm -f "$2"
  fi
}

take_back_what_was_cut_off() {
  rm -rf "$before.new" "$before.done"
  [ -d "$before" ] || return 0
  say "An earlier installation was cut off: taking back what it had changed"
  take_back "$before"
  # What runs may be what was taken back.
  if [ "$back" = "$name" ]; then
    restart_needed=yes
  elif has_systemd; then
    case $(property "$back" ActiveState) in
      active | activating | reloading) systemctl restart --no-block "$back" || true ;;
    esac
  fi
}

# tidy: versions that are neither in force nor the last one before, and that nothing runs from, go.
tidy() {
  current=$(readlink "$bin/nixlet")
  current=${current%/bin/nixlet}
  if [ "$(cat "$opt/current" 2>/dev/null || true)" != "$current" ]; then
    [ ! -f "$opt/current" ] || mv -f "$opt/current" "$opt/previous"
    echo "$current" >"$opt/current.new"
    mv -f "$opt/current.new" "$opt/current"
  fi
  for old in "$opt"/*; do
    # What has no stamp is not ours.
    if [ ! -f "$old/$environment_stamp" ] || [ "$old" = "$current" ] || [ "$old" = "$(cat "$opt/previous" 2>/dev/null || true)" ] ||
      [ "$old/bin/nixlet" = "$(cat "$ready/link" 2>/dev/null || true)" ] ||
      grep -qaF -- "$old/" /proc/[0-9]*/cmdline 2>/dev/null; then
      continue
    fi
    say "Removing ${old##*/}, which is in nobody's use"
    remove_version "$old"
  done
}
