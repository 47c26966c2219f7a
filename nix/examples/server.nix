# A Nix image of a server without nixpkgs: busybox's httpd and its page as separate store paths. Built by scripts/quickstart --kubernetes:
#
#   nix-build nix/examples/server.nix --argstr nixlet "$PWD/.venv/bin/nixlet" -A image
#
# The builder copies the host's busybox, so the build needs `sandbox = false`.
{
  nixlet ? "nixlet",
  shell ? "/bin/busybox",
  system ? builtins.currentSystem,
}:
let
  buildImage = import ../build-image.nix { inherit nixlet shell system; };

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
      }
      // environment
    );

  busybox = run "busybox" { } "$shell mkdir -p $out/bin; $shell cp $shell $out/bin/busybox";

  page = builtins.toFile "index.html" "Hello from the Nix store!\n";

  site = run "site" { inherit page; } "$shell mkdir $out; $shell ln -s $page $out/index.html";
in
{
  inherit busybox page site;

  image = buildImage {
    name = "server";
    resolvedByNix = true;
    config = {
      Entrypoint = [
        "${busybox}/bin/busybox"
        "httpd"
        "-f"
        "-p"
        "8080"
        "-h"
        "${site}"
      ];
    };
  };
}
