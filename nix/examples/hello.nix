# A Nix image without nixpkgs: Debian's hello, its loader and its libc as separate store paths, patched with patchelf, beside
# a store path that is a plain file and one that is a symlink. Built by scripts/quickstart and by the tests:
#
#   nix-build nix/examples/hello.nix --argstr nixlet "$PWD/.venv/bin/nixlet" -A image
#
# The builders call the host's programs by absolute path, so the build needs `sandbox = false`.
{
  nixlet ? "nixlet",
  shell ? "/bin/busybox",
  program ? "/usr/bin/hello",
  patchelf ? "/usr/bin/patchelf",
  system ? builtins.currentSystem,
}:
let
  buildImage = import ../build-image.nix { inherit nixlet shell system; };

  run =
    name: environment: script:
    derivation (
      {
        inherit name system program patchelf;
        builder = shell;
        args = [
          "sh"
          "-euc"
          "PATH=/usr/bin:/bin; ${script}"
        ];
      }
      // environment
    );

  # What the program asks for decides: the loader's name and place differ from machine to machine.
  loader = run "loader" { } ''
    interpreter=$($patchelf --print-interpreter $program)
    mkdir -p $out/lib
    cp -L $interpreter $out/lib/
  '';

  libc = run "libc" { } ''
    mkdir -p $out/lib
    cp -L $(ldd $program | sed -n 's/.*libc\.so\.6 => \([^ ]*\).*/\1/p') $out/lib/
  '';

  hello = run "hello" { inherit loader libc; } ''
    mkdir -p $out/bin
    cp $program $out/bin/hello
    chmod u+w $out/bin/hello
    $patchelf --set-interpreter $loader/lib/* --set-rpath $libc/lib $out/bin/hello
    chmod a-w $out/bin/hello
  '';

  greeting = builtins.toFile "greeting.txt" "A store path that is a plain file.\n";

  helloLink = run "hello-link" { inherit hello; } "ln -s $hello/bin/hello $out";

  root = run "root" { inherit hello greeting helloLink; } ''
    mkdir -p $out/bin $out/share
    ln -s $hello/bin/hello $out/bin/hello
    ln -s $helloLink $out/bin/hello-link
    ln -s $greeting $out/share/greeting.txt
  '';
in
{
  inherit loader libc hello greeting helloLink root;

  image = buildImage {
    name = "hello";
    resolvedByNix = true;
    copyToRoot = root;
    config = {
      Entrypoint = [ "/bin/hello" ];
      Env = [ "PATH=/bin" ];
    };
  };
}
