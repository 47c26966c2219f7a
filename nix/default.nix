# What nixlet has for Nix: the package, and `buildImage`, which needs it.
#
#   nixlet = import ./nix { inherit pkgs; };   # from nixpkgs
#   nixlet = import ./nix { };                 # without nixpkgs, from this machine's files: see from-host.nix
{
  pkgs ? null,
}:
let
  host = import ./from-host.nix { };
  nixlet = if pkgs == null then host.nixlet else pkgs.callPackage ./package.nix { };
in
{
  inherit nixlet;
  busybox = if pkgs == null then host.busybox else pkgs.busybox;
  buildImage =
    if pkgs == null then
      import ./build-image.nix { inherit (host) nixlet busybox; }
    else
      pkgs.callPackage ./build-image.nix { inherit nixlet; };
}
