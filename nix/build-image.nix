# buildImage: a Nix image, an archive that names a closure and holds next to nothing itself.
#
#   nixlet = import ./nix { inherit pkgs; };   # or without nixpkgs: import ./nix { }
#   nixlet.buildImage {
#     name = "hello";
#     resolvedByNix = true;
#     copyToRoot = pkgs.hello;
#     config.Entrypoint = [ "/bin/hello" ];
#   }
#
# By itself, for a nixlet from elsewhere: pkgs.callPackage ./build-image.nix { inherit nixlet; }
{
  # The nixlet package, or the path of its program. A program outside the store can't be called from Nix's sandbox.
  nixlet,
  busybox ? (import ./from-host.nix { inherit system; }).busybox,
  # A program that has busybox's `sh`, `mkdir`, `cp`, `chmod`, `tr` and `awk` as subcommands. Best a static one.
  shell ? "${busybox}/bin/busybox",
  stdenv ? null,
  system ? if stdenv == null then builtins.currentSystem else stdenv.hostPlatform.system,
}:
let
  program = if builtins.isAttrs nixlet then "${nixlet}/bin/nixlet" else toString nixlet;

  run =
    name: environment: script:
    derivation (
      {
        inherit name system shell;
        builder = shell;
        args = [
          "sh"
          "-euc"
          script
        ];
        preferLocalBuild = true;
        allowSubstitutes = false;
      }
      // environment
    );

  writeText =
    name: text:
    run name {
      inherit text;
      passAsFile = [ "text" ];
    } ''"$shell" cp "$textPath" "$out"'';

  toList = value: if value == null then [ ] else if builtins.isList value then value else [ value ];

  # The closure of some store paths, as nixpkgs' closureInfo has it: `store-paths`, one a line, and `registration`, the
  # form that `nix-store --load-db` reads. Nix itself computes the closure and hands it over as JSON: objects that hold
  # no objects and strings that need no escapes, so that a line for each object is easily taken apart.
  makeClosureInfo =
    roots:
    derivation {
      name = "closure-info";
      inherit system;
      builder = shell;
      __structuredAttrs = true;
      exportReferencesGraph.closure = roots;
      preferLocalBuild = true;
      allowSubstitutes = false;
      args = [
        "sh"
        "-euc"
        ''
          shell=$1 out=$2
          # It is there in every version; Nix 2.8's variable has a path outside of the sandbox.
          attributes=.attrs.json
          [ -e "$attributes" ] || attributes=$NIX_ATTRS_JSON_FILE
          "$shell" mkdir "$out"
          "$shell" tr '{}' '\n\n' <"$attributes" | "$shell" awk -v out="$out" '
            function text(key) {
              return match($0, "\"" key "\":\"[^\"]*\"") ? substr($0, RSTART + length(key) + 4, RLENGTH - length(key) - 5) : ""
            }
            /"narHash":"/ && /"path":"/ {
              match($0, /"narSize":[0-9]+/); size = substr($0, RSTART + 10, RLENGTH - 10)
              match($0, /"references":\[[^]]*\]/); list = substr($0, RSTART + 14, RLENGTH - 15)
              gsub(/"/, "", list); count = split(list, references, ",")
              print text("path") >(out "/store-paths")
              printf "%s\n%s\n%s\n\n%d\n", text("path"), text("narHash"), size, count >(out "/registration")
              for (i = 1; i <= count; i++) print references[i] >(out "/registration")
              found = 1
            }
            END { if (!found) exit 1 }'
        ''
        "closure-info"
        shell
        (builtins.placeholder "out")
      ];
    };

  # A program, as a store path that is executable by itself.
  script =
    name: text:
    run name {
      text = "#!${shell} sh\n${text}";
      passAsFile = [ "text" ];
    } ''"$shell" cp "$textPath" "$out"; "$shell" chmod 555 "$out"'';

  characters = text: builtins.genList (place: builtins.substring place 1 text) (builtins.stringLength text);

  quote = text: "'${builtins.replaceStrings [ "'" ] [ "'\\''" ] (toString text)}'";
in
{
  # The image's name, without its tag: "hello", "registry.example/team/hello".
  name,
  tag ? "latest",
  # Whether the image goes by the store path of its archive, `nix:0/nix/store/…`, so that nodes get it from Nix alone.
  resolvedByNix ? false,
  # The archive of an image to build upon: this function's, dockerTools', or one of `docker save`.
  fromImage ? null,
  # A package, or a list of packages, whose files appear below /.
  copyToRoot ? null,
  # The "config" object of an OCI image configuration: Entrypoint, Cmd, Env, WorkingDir, User, …
  config ? { },
  # A derivation that lists the closure, in place of the one that is made here from `config` and `copyToRoot`.
  closureInfo ? null,
}:
let
  # With resolvedByNix the derivation's name becomes a part of the image's, in which kubelets take words of small letters and
  # digits, with single separators.
  ownName = baseNameOf name;
  letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
  small = builtins.replaceStrings (characters letters) (characters "abcdefghijklmnopqrstuvwxyz") ownName;
  words = builtins.filter (word: builtins.isString word && word != "") (builtins.split "[^a-z0-9]+" small);
  baseName =
    if !resolvedByNix || builtins.match "[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*" ownName != null then
      ownName
    else if words == [ ] then
      throw "buildImage: the name ${builtins.toJSON name} has neither letters nor digits"
    else
      builtins.concatStringsSep "-" words;
  tagged = builtins.match "(.*):([^/:]*)" name;
  # What the archive's store path can be called (211 characters, with what stands before and behind in the names of derivations).
  isStoreName = builtins.match "[0-9A-Za-z+._?=-]+" baseName != null && builtins.stringLength baseName <= 193;
  reference = "nix:0${builtins.storeDir}/${builtins.hashString "md5" ""}-nix-image-${baseName}.tar";

  roots = toList copyToRoot;
  configFile = writeText "config-${baseName}.json" (builtins.toJSON config);
  info = if closureInfo == null then makeClosureInfo ([ configFile ] ++ roots) else closureInfo;

  image = run "nix-image-${baseName}.tar" {
    inherit configFile;
    nixlet = program;
    closureInfo = info;
    copyToRoot = builtins.toJSON (map toString roots);
    passAsFile = [ "copyToRoot" ];
    fromImage = if fromImage == null then "" else fromImage;
    ref = if resolvedByNix then "" else "${name}:${tag}";
    NIX_STORE_DIR = builtins.storeDir;
    PYTHONDONTWRITEBYTECODE = "1";
  } ''
    set -- --config "$configFile" --closure "$closureInfo/store-paths" --closure-info "$closureInfo" --copy-to-root "$copyToRootPath"
    [ -z "$fromImage" ] || set -- "$@" --from-image "$fromImage"
    [ -z "$ref" ] || set -- "$@" --ref "$ref"
    exec "$nixlet" image build "$@" "$out"
  '';
in
if resolvedByNix && builtins.stringLength reference > 255 then
  throw "buildImage: the name ${name} is too long: image references have at most 255 characters, this one would have ${toString (builtins.stringLength reference)}"
else if tagged != null && !resolvedByNix then
  throw "buildImage: the name ${builtins.toJSON name} has a tag; write: name = ${builtins.toJSON (builtins.elemAt tagged 0)}; tag = ${builtins.toJSON (builtins.elemAt tagged 1)};"
else if !isStoreName then
  throw "buildImage: the last part of the name ${builtins.toJSON name} can't be a store path's: it needs 1 to 193 letters, digits, or characters of + . _ ? = -"
else
image
// {
  closureInfo = info;
  inherit configFile;

  # The reference for a pod's `image`.
  image = if resolvedByNix then "nix:0${image}" else "${name}:${tag}";

  # A program that loads the image into a containerd.
  copyToContainerd =
    {
      address ? null,
      namespace ? null,
    }:
    script "copy-to-containerd-${baseName}" ''
      exec ${quote program} image load ${if address == null then "" else "--address ${quote address} "}${
        if namespace == null then "" else "--namespace ${quote namespace} "
      }"$@" ${image}
    '';
}
