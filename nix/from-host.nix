# nixlet and busybox as store paths that need nothing else, made of this machine's files: for those who have no nixpkgs.
#
# A build in Nix's sandbox sees the store alone, so whatever runs in it must lie there. What is taken is copied: a static
# busybox, the Python that nixlet runs with, the libraries that this Python loads, and nixlet with its requirements.
{
  # The virtual environment that has nixlet's requirements; ./scripts/quickstart makes it.
  environment ? ../.venv,
  # Has bin/busybox, a static one.
  prefix ? /usr,
  system ? builtins.currentSystem,
}:
let
  inherit (builtins)
    attrNames
    baseNameOf
    elem
    filter
    head
    isString
    match
    pathExists
    readDir
    readFile
    replaceStrings
    split
    stringLength
    substring
    ;

  lines = text: filter (line: isString line && line != "") (split "\n" text);
  matches = pattern: texts: filter (found: found != null) (map (match pattern) texts);
  only = what: found: if found == [ ] then throw what else head found;

  # A part of a directory: the files for whose paths below it `wanted` is true. Directories on the way must be wanted, too.
  part =
    name: path: wanted:
    builtins.path {
      inherit name path;
      filter =
        file: type:
        baseNameOf file != "__pycache__"
        && wanted (substring (stringLength (toString path) + 1) (stringLength file) file) type;
    };

  busybox = part "busybox" prefix (
    file: _:
    elem file [
      "bin"
      "bin/busybox"
    ]
  );

  # Python finds its own library beside itself.
  version =
    if pathExists (environment + "/lib") then
      only "${toString environment} has no Python 3" (
        filter (name: match "python3\\.[0-9]+" name != null) (attrNames (readDir (environment + "/lib")))
      )
    else
      throw "${toString environment} is no virtual environment: run ./scripts/quickstart, which makes it, or name another one";
  home = head (
    only "${toString environment}/pyvenv.cfg names no Python" (
      matches "home *= *([^ ]+) *" (lines (readFile (environment + "/pyvenv.cfg")))
    )
  );
  unneeded = "site-packages|dist-packages|test|idlelib|ensurepip|lib2to3|turtledemo|config-.*|sitecustomize\\.py";
  python = part "python" (/. + dirOf home) (
    file: _:
    elem file [
      "bin"
      "bin/${version}"
      "lib"
      "lib/${version}"
    ]
    || match "lib/libpython[^/]*" file != null
    || (match "lib/${version}/.*" file != null && match "lib/${version}/(${unneeded})(/.*)?" file == null)
  );

  # Where distributions have their libraries.
  libraryDirectory =
    only "this machine's C library is not found"
      (filter (directory: pathExists (directory + "/libc.so.6")) [
        (/usr/lib + "/${replaceStrings [ "-linux" "i686" ] [ "-linux-gnu" "i386" ] system}")
        /usr/lib/arm-linux-gnueabihf
        /usr/lib64
        /usr/lib
      ]);
  loaders = "ld-linux[^/]*\\.so\\.[0-9]+|ld64\\.so\\.[0-9]+";
  wantedLibraries = "c|m|dl|pthread|rt|util|gcc_s|stdc\\+\\+|z|bz2|lzma|zstd|expat|ffi|ssl|crypto|uuid|sqlite3";
  libraries = part "libraries" libraryDirectory (
    file: type: type != "directory" && match "${loaders}|lib(${wantedLibraries})\\.so[.0-9]*" file != null
  );
  loader = only "this machine's loader is not found" (
    filter (name: match loaders name != null) (attrNames (readDir libraryDirectory))
  );

  # The requirements as they were installed: what each has, stands in its record.
  site = environment + "/lib/${version}/site-packages";
  installed = attrNames (readDir site);
  # Records are named by what the package calls itself ("PyYAML-6.0.4.dist-info"), or by its plain form.
  canonical = replaceStrings [ "-" "." "Y" "A" "M" "L" ] [ "_" "_" "y" "a" "m" "l" ];
  recordOf =
    requirement:
    only "${requirement} is not installed in ${toString environment}" (
      filter (name: match "${canonical requirement}_[0-9].*_dist_info" (canonical name) != null) installed
    );
  requirements = map head (matches "([a-z0-9-]+)==.*" (lines (readFile ../requirements/runtime.txt)));
  needed = requirement: !(requirement == "typing-extensions" && match "python3\\.1[3-9]" version != null);
  tops = builtins.listToAttrs (
    map
      (found: {
        name = head found;
        value = true;
      })
      (
        matches "([^/,]+)[/,].*" (
          builtins.concatMap (requirement: lines (readFile (site + "/${recordOf requirement}/RECORD"))) (
            filter needed requirements
          )
        )
      )
  );
  dependencies = part "python-packages" site (file: _: tops ? ${head (match "([^/]+).*" file)});

  source = part "nixlet-source" ../src (_: _: true);

  run = "${libraries}/${loader} --library-path ${libraries}:${python}/lib ${python}/bin/${version} -I -X pycache_prefix=${builtins.placeholder "out"}/byte-code";
  start = "import sys; sys.path += ['${source}', '${dependencies}']; from nixlet.__main__ import main; sys.exit(main())";

  nixlet = derivation {
    name = "nixlet";
    inherit system;
    builder = "${busybox}/bin/busybox";
    preferLocalBuild = true;
    allowSubstitutes = false;
    program = ''
      #!${busybox}/bin/busybox sh
      exec ${run} -c "${start}" "$@"
    '';
    passAsFile = [ "program" ];
    args = [
      "sh"
      "-euc"
      # The store can't be written to afterwards: without byte code, each start would compile all that it loads. Nobody changes
      # what lies there, so it needn't be looked whether the byte code is still that of the files.
      ''
        ${busybox}/bin/busybox mkdir -p "$out/bin"
        ${run} -m compileall -q --invalidation-mode unchecked-hash ${python}/lib/${version} ${dependencies} ${source}
        ${busybox}/bin/busybox cp "$programPath" "$out/bin/nixlet"
        ${busybox}/bin/busybox chmod 555 "$out/bin/nixlet"
      ''
    ];
  };
in
{
  inherit nixlet busybox;
}
